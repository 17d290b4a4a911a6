"""Log probabilities of tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alpaca_lora.inference.request import TokenLogprob
from alpaca_lora.text.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # minus infinity is no JSON; OpenAI writes this


class LogprobWriter:
    """Of one answer: it counts the characters that were told, for ``text_offset``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The ``logprobs`` of a chat choice: a list with an object for each token."""
        content = [
            self._entry(one.token_id, one.logprob) | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def text(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The ``logprobs`` of a text choice: four lists, with an entry for each token."""
        names, offsets = [], []
        for one in tokens:
            name = self._name(one.token_id)
            names.append(name)
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [{self._name(index): _finite(value) for index, value in one.top} for one in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _name(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else IMPOSSIBLE
