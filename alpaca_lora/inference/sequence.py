"""One request on its way: tokens so far, the text that is safe to show, when it ends. Knows no model and no cache."""

from __future__ import annotations

import torch

from alpaca_lora.inference.request import Completion, Event, FinishReason, Request
from alpaca_lora.inference.sampler import Sampler
from alpaca_lora.inference.stop_strings import StopStrings
from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.tokenizer import Tokenizer


class Sequence:
    """``token_ids`` are the answer's tokens; ``max_tokens`` bounds them (the request's limit, or the context's)."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, *, context_length: int, device: torch.device
    ) -> None:
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        self.max_tokens = min(request.params.max_new_tokens, context_length - len(request.prompt_ids))
        self.sampler = Sampler(request.params, request.prompt_ids, device)
        self._stop_ids = frozenset(request.params.stop_ids)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.params.stop)
        self._texts: list[str] = []

    def push(self, token_id: int) -> Event:
        """Take the next token; the event holds the text that has become certain, and the completion at the end."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            return self._finish(self._stops.push(self._detokenizer.flush()), "stop")
        text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.found:
            return self._finish(text, "stop")
        if len(self.token_ids) >= self.max_tokens:
            return self._finish(text + self._stops.push(self._detokenizer.flush()), "length")
        self._texts.append(text)
        return Event(self.index, text)

    def _finish(self, text: str, reason: FinishReason) -> Event:
        if self._stops.found:
            reason = "stop"
        text += self._stops.flush()
        self._texts.append(text)
        completion = Completion("".join(self._texts), tuple(self.token_ids), reason, len(self.request.prompt_ids))
        return Event(self.index, text, completion)
