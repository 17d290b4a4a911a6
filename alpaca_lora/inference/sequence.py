"""One request on its way: its places, the tokens so far, the text that is safe to show, when it ends. Knows no model.

A place is what takes room in the cache: the adapter's virtual tokens first, then the prompt, then the answer.
"""

from __future__ import annotations

import torch

from alpaca_lora.inference.block_table import VIRTUAL, BlockTable
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.inference.request import Completion, Event, FinishReason, Request, TokenLogprob
from alpaca_lora.inference.sampler import Sampler
from alpaca_lora.inference.stop_strings import StopStrings
from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.tokenizer import Tokenizer


class Sequence:
    """``ids`` are those of all its places, ``token_ids`` the answer's alone.

    max_tokens: the answer has at most so many; 0 for a request that makes none. adapter: the one that answers, held
    until the sequence ends. num_virtual: places before the prompt.
    """

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, table: BlockTable, *, max_tokens: int,
        device: torch.device, adapter: LoadedAdapter | None = None, num_virtual: int = 0,
    ) -> None:  # fmt: skip
        self.index, self.request, self.table, self.adapter = index, request, table, adapter
        self.max_tokens, self.num_virtual = max_tokens, num_virtual
        self.ids = [VIRTUAL] * num_virtual + list(request.prompt_ids)
        self.num_cached: int | None = None  # tokens of the prompt; None until it has started
        self.sampler = Sampler(request.params, request.prompt_ids, device)
        self._stop_ids = frozenset(request.params.stop_ids)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.params.stop)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.ids[self.num_virtual + len(self.request.prompt_ids) :])

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.num_virtual - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Places whose keys and values are not there yet."""
        return len(self.ids) - self.table.length

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Event:
        """Take the next token; the event holds the text that has become certain, and the completion at the end."""
        self.ids.append(token_id)
        new = (token_id,), () if logprob is None else (logprob,)
        self._logprobs += new[1]
        if token_id in self._stop_ids:
            return self._finish(self._stops.push(self._detokenizer.flush()), "stop", new)
        text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.found:
            return self._finish(text, "stop", new)
        if self.sampler.is_done or self.num_tokens >= self.max_tokens:
            reason: FinishReason = "stop" if self.sampler.is_done else "length"
            return self._finish(text + self._stops.push(self._detokenizer.flush()), reason, new)
        self._texts.append(text)
        return Event(self.index, text, None, *new)

    def cancel(self) -> Event:
        """End here, with all the text there is."""
        return self._finish(self._stops.push(self._detokenizer.flush()), "cancelled")

    def fail(self, error: str) -> Event:
        """End here because of ``error``."""
        return self._finish("", "error", error=error)

    def classify(self, class_logits: tuple[float, ...]) -> Event:
        """End with the classes of the prompt."""
        return self._finish("", "stop", class_logits=class_logits)

    def _finish(
        self,
        text: str,
        reason: FinishReason,
        new: tuple[tuple[int, ...], tuple[TokenLogprob, ...]] = ((), ()),
        *,
        error: str | None = None,
        class_logits: tuple[float, ...] | None = None,
    ) -> Event:
        if self._stops.found and reason == "length":
            reason = "stop"
        text += self._stops.flush()
        self._texts.append(text)
        completion = Completion(
            "".join(self._texts), self.token_ids, reason, len(self.request.prompt_ids), self.num_cached or 0,
            None if self.request.params.logprobs is None else tuple(self._logprobs), error, class_logits,
        )  # fmt: skip
        return Event(self.index, text, completion, *new)
