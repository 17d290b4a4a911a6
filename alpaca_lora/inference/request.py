"""The nouns of the inference room: what is asked and what came out. Knows no model and no template."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from alpaca_lora.errors import ConfigError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends. Raises ConfigError for an impossible value.

    temperature 0 is greedy: top_k, top_p, min_p and seed have no effect then. top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 switch their filter off. seed None: a new one for each request.
    stop_ids end the answer with their token, stop with their text; neither is part of the answer's text.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

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
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("stop", all(self.stop), "texts of at least one character"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ConfigError(f"is {getattr(self, name)!r}", field=name, expected=expected)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question as token ids, BOS and template included (see `inference.prompts`)."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    text: without the stop text or stop token. token_ids: every token that was made, the stop token included.
    finish_reason: `stop` (a stop id or stop text came) or `length` (max_new_tokens, or the model's context is full).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Event:
    """A step of one request's answer: some new text (may be empty), and the completion when it was the last step.

    index: the request's place in the list that was given to the engine.
    """

    index: int
    text: str
    completion: Completion | None = None
