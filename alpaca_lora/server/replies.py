"""Answers in OpenAI's shapes: the whole object, or the chunks of a stream. Pure: pieces in, JSON out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from alpaca_lora.inference.request import TokenLogprob
from alpaca_lora.server.generation import Delta, Usage
from alpaca_lora.server.logprobs import LogprobWriter
from alpaca_lora.text.tokenizer import Tokenizer


@dataclass
class Whole:
    """One choice, gathered."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    refusal: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.refusal = delta.refusal


class Reply(Protocol):
    """One of OpenAI's two shapes of an answer."""

    def whole(self, choices: list[Whole], usage: Usage) -> dict[str, Any]: ...
    def opening(self, num_choices: int) -> Iterator[dict[str, Any]]: ...
    def chunk(self, delta: Delta) -> dict[str, Any]: ...
    def usage_chunk(self, usage: Usage) -> dict[str, Any]: ...


class _Head:
    """What every object of one answer repeats."""

    def __init__(
        self, prefix: str, kind: str, model: str, fingerprint: str, tokenizer: Tokenizer, *, with_logprobs: bool,
        include_usage: bool,
    ) -> None:  # fmt: skip
        self._kind, self._tokenizer, self._with_logprobs = kind, tokenizer, with_logprobs
        self._writers: dict[int, LogprobWriter] = {}
        self._fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }  # fmt: skip
        self._no_usage: dict[str, Any] = {"usage": None} if include_usage else {}

    def _object(self, choices: list[dict[str, Any]], *, suffix: str = "", **more: Any) -> dict[str, Any]:
        return {**self._fields, "object": self._kind + suffix, "choices": choices, **more}

    def _writer(self, choice: int) -> LogprobWriter:
        return self._writers.setdefault(choice, LogprobWriter(self._tokenizer))


class ChatReply(_Head):
    """chat.completion and chat.completion.chunk."""

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer, **asked: bool) -> None:
        super().__init__("chatcmpl", "chat.completion", model, fingerprint, tokenizer, **asked)

    def whole(self, choices: list[Whole], usage: Usage) -> dict[str, Any]:
        found = [
            {
                "index": number, "message": {"role": "assistant", "content": one.text, "refusal": one.refusal},
                "logprobs": self._writer(number).chat(one.logprobs) if self._with_logprobs else None,
                "finish_reason": one.finish_reason,
            }
            for number, one in enumerate(choices)
        ]  # fmt: skip
        return self._object(found, usage=usage_json(usage))

    def opening(self, num_choices: int) -> Iterator[dict[str, Any]]:
        for number in range(num_choices):
            yield self._chunk(number, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        told: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.refusal is not None:
            told["refusal"] = delta.refusal
        logprobs = self._writer(delta.choice).chat(delta.logprobs) if delta.logprobs else None
        return self._chunk(delta.choice, told, logprobs, delta.finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._object([], suffix=".chunk", usage=usage_json(usage))

    def _chunk(self, number: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object([choice], suffix=".chunk", **self._no_usage)


class TextReply(_Head):
    """text_completion, whole and in chunks."""

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer, **asked: bool) -> None:
        super().__init__("cmpl", "text_completion", model, fingerprint, tokenizer, **asked)

    def whole(self, choices: list[Whole], usage: Usage) -> dict[str, Any]:
        found = [
            {
                "index": number, "text": one.text, "finish_reason": one.finish_reason,
                "logprobs": self._writer(number).text(one.logprobs) if self._with_logprobs else None,
            }
            for number, one in enumerate(choices)
        ]  # fmt: skip
        return self._object(found, usage=usage_json(usage))

    def opening(self, num_choices: int) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._writer(delta.choice).text(delta.logprobs) if delta.logprobs else None
        choice = {
            "index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason
        }  # fmt: skip
        return self._object([choice], **self._no_usage)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._object([], usage=usage_json(usage))


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
