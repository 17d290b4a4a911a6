"""The generation loop: prompts in packs, then one token per running sequence and step, all sequences together.

Knows token ids only: no template, no terminal. The model is called under `torch.inference_mode`; an attached adapter
runs inside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many

import torch

from alpaca_lora.errors import UserError
from alpaca_lora.inference.kv_cache import KVCache
from alpaca_lora.inference.request import Completion, Event, Request
from alpaca_lora.inference.sequence import Sequence
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.text.tokenizer import Tokenizer


class Engine:
    """Answers requests with one model.

    max_running: sequences decoded together; more wait their turn. prefill_tokens: prompt tokens of one forward at most;
    a longer prompt takes several, which bounds memory.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, *, max_running: int = 32, prefill_tokens: int = 2048
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._num_positions = model.config.max_position_embeddings
        self._device = next(model.parameters()).device
        self._max_running, self._prefill_tokens = max_running, prefill_tokens
        dynamic = [rope for rope in model.config.ropes if rope.kind == "dynamic"]
        self._cuts_prompts = not dynamic
        if dynamic:
            # dynamic NTK turns by the whole sequence's length, which it reads off a run of positions: a prompt is never
            # cut, and sequences are not decoded together, where the positions of two could look like one run
            self._max_running = 1
            self._num_positions = max(self._num_positions, *(int(r.trained_positions * r.factor) for r in dynamic))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the model has positions for, those of its prefix left out."""
        return self._num_positions - self.model.prefix_length

    def generate(self, requests: Many[Request]) -> list[Completion]:
        """The answers, in the order of the requests."""
        completions = {e.index: e.completion for e in self.stream(requests) if e.completion is not None}
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Many[Request]) -> Iterator[Event]:
        """Events as text becomes certain; the last event of each request brings its completion. Close it to stop early.

        UserError for a prompt that is empty or leaves no room for a token in the model's context.
        """
        for request in requests:
            self._check(request)
        return self._run(requests)

    def _run(self, requests: Many[Request]) -> Iterator[Event]:
        waiting = deque(
            Sequence(i, r, self.tokenizer, context_length=self.context_length, device=self._device)
            for i, r in enumerate(requests)
        )
        cache = KVCache()
        running: list[Sequence] = []  # running[slot] is the sequence in that slot of the cache
        while waiting or running:
            while waiting and len(running) < self._max_running:
                room = self._max_running - len(running)
                joining = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                tokens = self._prefill(cache, joining)
                running.extend(joining)
                yield from self._advance(cache, running, len(running) - len(joining), tokens)
            if running:
                yield from self._advance(cache, running, 0, self._decode(cache, running))

    def _check(self, request: Request) -> None:
        num_tokens = len(request.prompt_ids)
        if num_tokens == 0:
            raise UserError("has no tokens", field="prompt", expected="at least one token")
        if num_tokens >= self.context_length:
            num_virtual = self.model.prefix_length
            behind = f" behind {num_virtual} virtual tokens" if num_virtual else ""
            raise UserError(
                f"has {num_tokens} tokens", field="prompt",
                expected=f"fewer than the model's context of {self.context_length} tokens{behind}", fix="shorten it",
            )  # fmt: skip
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.config.vocab_size:
            raise UserError(
                f"has token {max(request.prompt_ids)}", field="prompt",
                expected=f"ids below the model's vocabulary of {self.model.config.vocab_size}",
                fix="check that tokenizer and model belong together",
            )  # fmt: skip

    @staticmethod
    def _advance(cache: KVCache, running: list[Sequence], first: int, tokens: Many[int]) -> Iterator[Event]:
        """Give running[first:] their tokens, take the finished ones out, then tell."""
        events = [sequence.push(token) for sequence, token in zip(running[first:], tokens, strict=True)]
        for row in range(len(events) - 1, -1, -1):
            if events[row].completion is not None:
                cache.remove(first + row)
                running[first + row] = running[-1]
                running.pop()
        yield from (event for event in events if event.text or event.completion is not None)

    @torch.inference_mode()
    def _prefill(self, cache: KVCache, joining: list[Sequence]) -> list[int]:
        """Run the prompts through the model, several in a stream; the first token of each."""
        slots = [cache.add() for _ in joining]
        tokens: list[int] = []
        for pack in self._packs([len(sequence.request.prompt_ids) for sequence in joining]):
            ids: list[int] = []
            positions: list[int] = []
            ended: list[Sequence] = []
            last_rows: list[int] = []
            for member, start, stop in pack:
                prompt_ids = joining[member].request.prompt_ids
                ids += prompt_ids[start:stop]
                positions += range(start, stop)
                if stop == len(prompt_ids):
                    ended.append(joining[member])
                    last_rows.append(len(ids) - 1)
            plan = cache.extend([(slots[member], stop - start) for member, start, stop in pack])
            hidden_TD = self.model(self._ids(ids), self._ids(positions), plan)
            if ended:
                logits_BV = self.model.logits(hidden_TD[last_rows])
                tokens += [s.sampler.choose(logits_V) for s, logits_V in zip(ended, logits_BV, strict=True)]
        return tokens

    @torch.inference_mode()
    def _decode(self, cache: KVCache, running: list[Sequence]) -> list[int]:
        """The next token of every running sequence."""
        ids_B = self._ids([sequence.token_ids[-1] for sequence in running])
        positions_B = self._ids(cache.lengths)
        plan = cache.extend([(slot, 1) for slot in range(len(running))])
        logits_BV = self.model.logits(self.model(ids_B, positions_B, plan))
        return [s.sampler.choose(logits_V) for s, logits_V in zip(running, logits_BV, strict=True)]

    def _packs(self, lengths: list[int]) -> Iterator[list[tuple[int, int, int]]]:
        """Cut prompts into forwards of at most `prefill_tokens`: (member, start, stop), members in order."""
        pack: list[tuple[int, int, int]] = []
        room = self._prefill_tokens
        for member, length in enumerate(lengths):
            start = 0
            while start < length:
                stop = min(length, start + room) if self._cuts_prompts and length > self._prefill_tokens else length
                if pack and stop - start > room:
                    yield pack
                    pack, room = [], self._prefill_tokens
                    continue
                pack.append((member, start, stop))
                room -= stop - start
                start = stop
                if room <= 0:
                    yield pack
                    pack, room = [], self._prefill_tokens
        if pack:
            yield pack

    def _ids(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
