"""The options of the service: where it listens, what it serves, how much it takes on. No torch: the help reads this."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alpaca_lora.config import Options


class ServeOptions(Options):
    """Keys of `serve`. API keys are never one of them: they come from the environment or a file."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; another than this machine's own "
                      "needs API keys")  # fmt: skip
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    lora: list[str] = Field([], description="adapters to serve, NAME=DIR each", json_schema_extra={"commas": False})
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="what the base model is called; none: as base_model"
    )
    api_keys_file: str | None = Field(
        None, min_length=1, description="file of API keys (KEY or NAME:KEY), beside those in ALPACA_LORA_API_KEYS"
    )
    adapter_dir: str | None = Field(
        None, min_length=1, description="folder below which the admin key may load adapters; none: loading is off"
    )
    max_adapter_gb: float | None = Field(
        None, gt=0, le=1_000_000, description="memory of adapters, in GB; the least recently used go first; none: all"
    )
    safety_policy: list[str] = Field(
        [], description="input and output rails: a policy file, bundled for the one of the package, or NAME=FILE for "
        "one model, NAME=none to leave it without; none: nothing is checked",
        json_schema_extra={"commas": False},
    )  # fmt: skip
    audit_log: str | None = Field(
        None, min_length=1, description="file for what rails find, a line of JSON each; none: standard error"
    )
    max_running: int = Field(32, ge=1, le=4096, description="answers that are computed together")
    max_queue: int = Field(128, ge=0, le=100_000, description="answers that wait beside them; more are told to retry")
    step_tokens: int = Field(512, ge=1, le=65536, description="most tokens of one step, prompts and answers together")
    kv_cache_gb: float | None = Field(
        None, gt=0, le=1_000_000, description="memory of keys and values, in GB; none: a quarter of what is free, and "
        "no more than max_running answers of the whole context need",
    )  # fmt: skip
    max_answer_tokens: int | None = Field(
        None, ge=1, description="most tokens of an answer, whatever is asked; none: the model's context"
    )
    request_timeout: float = Field(600, gt=0, le=86400, description="seconds until an answer must be finished")
    drain_timeout: float = Field(
        25, ge=0, le=86400, description="seconds that running answers have to finish after SIGTERM"
    )
    max_body_mb: float = Field(2.0, gt=0, le=1024, description="largest body of a request, in MB (1e6 bytes)")
    requests_per_minute: int = Field(0, ge=0, le=1_000_000, description="of one key; 0: as many as come")
    max_concurrency: int = Field(0, ge=0, le=100_000, description="requests of one key at once; 0: as many as come")
    cors_origins: list[str] = Field(
        [], description="origins whose pages may ask, such as https://example.org; none: only the server's own page"
    )
    log_level: Literal["info", "warning"] = Field("info", description="info: one line for each request; warning: none")
