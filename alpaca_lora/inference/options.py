"""The options of answering: what to ask, how long, how to choose the next token. No torch: the help reads this file."""

from __future__ import annotations

from pydantic import Field, model_validator

from alpaca_lora.config import Options
from alpaca_lora.errors import ConfigError


class GenerationOptions(Options):
    """Keys of `generate`; the defaults are greedy decoding."""

    lora_weights: str | None = Field(
        None, min_length=1, description="adapter folder in PEFT's format; none: the base model answers"
    )
    prompt: str | None = Field(None, description="one question, answered and done; none: chat in the terminal")
    input: str = Field("", description="further context of the prompt, the alpaca format's input")
    max_new_tokens: int = Field(256, ge=1, description="most tokens of one answer")
    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="0: always the likeliest token; 1: as modelled"
    )
    top_k: int = Field(0, ge=0, description="choose among the k likeliest tokens; 0: among all")
    top_p: float = Field(1.0, gt=0, le=1, description="choose among the likeliest tokens that hold this share; 1: all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens less likely than this share of the likeliest; 0: none"
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100, description="above 1: tokens that were there before become less likely"
    )
    generation_seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of the sampling; none: a new one each time"
    )
    stop: list[str] = Field(
        [], description="texts that end the answer; they are not part of it", json_schema_extra={"commas": False}
    )
    stream: bool = Field(True, description="show the answer while it is made")

    @model_validator(mode="after")
    def _check_together(self) -> GenerationOptions:
        if self.input and self.prompt is None:
            raise ConfigError(
                "input is given without a prompt",
                field="input",
                expected="prompt with it",
                fix="give prompt, or leave input out: a chat does not read it",
            )
        return self
