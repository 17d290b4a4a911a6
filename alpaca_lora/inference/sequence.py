"""One request on its way: its places, the tokens so far, the text that is safe to show, when it ends. Knows no model.

A place is what takes room in the cache: the adapter's virtual tokens first, then the prompt, then the answer.
"""

from __future__ import annotations

import time

import torch

from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.inference.block_table import VIRTUAL, BlockTable
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.inference.request import Completion, Event, FinishReason, Request, Times, TokenLogprob
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
        self._came_at = time.perf_counter()
        self._began_at: float | None = None  # when its turn came,
        self._first_at: float | None = None  # and when its first token was there

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

    def begin(self, num_cached: int) -> None:
        """Its turn has come for the first time; of the prompt, ``num_cached`` tokens need not be computed."""
        self.num_cached, self._began_at = num_cached, time.perf_counter()

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> Event:
        """Take the next token; the event holds the text that has become certain, and the completion at the end."""
        if self._first_at is None:
            self._first_at = time.perf_counter()
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

    def fail(self, error: AlpacaLoraError) -> Event:
        """End here because of ``error``."""
        # its traceback would keep the tensors of the step alive as long as somebody keeps the completion
        return self._finish("", "error", error=error.with_traceback(None))

    def classify(self, class_logits: tuple[float, ...]) -> Event:
        """End with the classes of the prompt."""
        return self._finish("", "stop", class_logits=class_logits)

    def _finish(
        self,
        text: str,
        reason: FinishReason,
        new: tuple[tuple[int, ...], tuple[TokenLogprob, ...]] = ((), ()),
        *,
        error: AlpacaLoraError | None = None,
        class_logits: tuple[float, ...] | None = None,
    ) -> Event:
        if self._stops.found and reason == "length":
            reason = "stop"
        text += self._stops.flush()
        self._texts.append(text)
        completion = Completion(
            "".join(self._texts), self.token_ids, reason, len(self.request.prompt_ids), self.num_cached or 0,
            None if self.request.params.logprobs is None else tuple(self._logprobs), error, class_logits,
            self._times(),
        )  # fmt: skip
        return Event(self.index, text, completion, *new)

    def _times(self) -> Times:
        """As of now; what it never came to took no time."""
        now = time.perf_counter()
        began_at = now if self._began_at is None else self._began_at
        first_at = now if self._first_at is None else self._first_at
        return Times(began_at - self._came_at, first_at - began_at, now - first_at)
