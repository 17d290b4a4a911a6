"""The bodies of the answering routes: closed lists of fields, strict types, ranges. OpenAI's, and a few of vLLM's.

Nothing is coerced and nothing is ignored: what a client of OpenAI can send and is not here stands in `unsupported.py`
and is refused by name. Defaults are OpenAI's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from alpaca_lora.inference.request import MAX_BIAS, MAX_LOGPROBS, MAX_PENALTY, SamplingParams

MAX_CHOICES = 16  # of one request: its prompts times n
MAX_STOPS = 16
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 1024
_TOKENS = 2**31 - 1  # more than any context; the model's own is checked where it is known

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=_TOKENS)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class Body(BaseModel):
    """A JSON object whose fields are all known; types are taken as they come."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """include_usage: a last event tells the tokens. include_obfuscation: padding that hides lengths; there is none."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingFields(Body):
    """What both answering routes have: how tokens are chosen, when an answer ends, how it is sent."""

    model: ModelName
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    logit_bias: dict[TokenKey, Bias] | None = Field(None, max_length=MAX_BIASED_TOKENS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: list[TokenId] = Field([], max_length=64, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)

    @model_validator(mode="before")
    @classmethod
    def _no_null_numbers(cls, data: Any) -> Any:
        """None is the default of fields that may be left out; sent as null they are no number."""
        if isinstance(data, dict):
            for name in ("seed", "max_tokens", "max_completion_tokens", "best_of", "logprobs", "top_logprobs"):
                if name in data and data[name] is None:
                    raise ValueError(f"{name}: null is not a number; leave the field out")
        return data

    @model_validator(mode="after")
    def _options_of_streams(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def params(self, *, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """All but the grammar, for the first of ``n`` choices."""
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        return SamplingParams(
            max_new_tokens=max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, logit_bias=bias, seed=self.seed,
            stop_ids=tuple(self.stop_token_ids), stop=self.stops, logprobs=logprobs,
        )  # fmt: skip


class TextPart(Body):
    """The one kind of content part that a text model reads."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn. The fields that must be null are those of an answer of ours that is sent back as it came."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64, fail_fast=True)]
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchemaFormat(Body):
    """strict is how it is always held; ``schema`` cannot be a field's name in Python."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    description: str | None = Field(None, max_length=4096)
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text: anything; json_object: any JSON object; json_schema: JSON of that schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: belongs to type 'json_schema', and only to it")
        return self


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; send one of them")
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last one is the assistant's: nothing is left to answer")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
        ]
    )
    max_tokens: int = Field(16, ge=1, lt=_TOKENS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _belong_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of: only n answers are made, so it can only be n")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"n: at most {MAX_CHOICES} answers, n times the number of prompts")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or one or more lists of token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ClassifyRequest(Body):
    """The body of /v1/classify."""

    model: ModelName
    input: str | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
    user: str | None = Field(None, max_length=512)

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ModerationRequest(Body):
    """The body of /v1/moderations. ``model``: whose policy; without it that of the base model."""

    model: ModelName | None = None
    input: (
        str | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=128, fail_fast=True)]
    )  # fmt: skip

    @property
    def texts(self) -> list[str]:
        parts: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        return [part.text if isinstance(part, TextPart) else part for part in parts]
