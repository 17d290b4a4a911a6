"""The nouns of the inference room: what is asked and what came out. Knows no model and no template."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from alpaca_lora.errors import AlpacaLoraError, ConfigError
from alpaca_lora.inference.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "error"]
RequestKind = Literal["generate", "classify"]

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends. Raises ConfigError for an impossible value.

    temperature 0 is greedy: top_k, top_p, min_p and seed have no effect then. top_k 0, top_p 1, min_p 0,
    repetition_penalty 1, presence_penalty 0 and frequency_penalty 0 switch theirs off. seed None: a new one for each
    request. logit_bias: (token id, what is added to its logit). stop_ids end the answer with their token, stop with
    their text; neither is part of the answer's text. logprobs: None, or how many of the likeliest tokens are told
    beside the chosen one. grammar: what the answer has to keep to.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "a number above 0",
            ),
            ("presence_penalty", abs(self.presence_penalty) <= MAX_PENALTY, "from -2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MAX_PENALTY, "from -2 to 2"),
            (
                "logit_bias",
                all(token >= 0 and abs(bias) <= MAX_BIAS for token, bias in self.logit_bias),
                "token ids with numbers from -100 to 100",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("stop", all(self.stop), "texts of at least one character"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ConfigError(f"is {str(getattr(self, name))[:100]}", field=name, expected=expected)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question as token ids, BOS and template included (see `inference.prompts`).

    adapter: its name in the engine's bank; None: the model as it is. salt: whose request it is; what one of them
    computed is never used for another. kind: `classify` asks for the classes of the prompt's last token and makes no
    token.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    salt: str = ""
    kind: RequestKind = "generate"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was made: its natural log probability, and (token id, log probability) of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Times(NamedTuple):
    """Seconds that one request waited for its turn, took from then to its first token (or its classes), and from there
    to its last token.
    """

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    text: without the stop text or stop token. token_ids: every token that was made, the stop token included.
    finish_reason: `stop` (a stop id or stop text came, the grammar is complete, or the classes), `length`
    (max_new_tokens, or the model's context is full), `cancelled`, or `error`, with what went wrong in `error`: a
    NumericalError, or the UserError of a grammar that cannot go on.
    cached_tokens: of the prompt, how many were not computed because an earlier request had them. logprobs: of each
    token, where they were asked for. class_logits: of a request of kind `classify`, in the order of the head's labels.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: AlpacaLoraError | None = None
    class_logits: tuple[float, ...] | None = None
    times: Times = field(default=Times(), compare=False)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Event:
    """A step of one request's answer: some new text (may be empty), and the completion when it was the last step.

    index: the request's place in the list that was given to the engine, or the number that `Engine.add` gave it.
    token_ids, logprobs: what was made in this step; their text may come later, when it is certain.
    """

    index: int
    text: str
    completion: Completion | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
