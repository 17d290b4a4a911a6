"""The generation loop: requests come and go at any time, each step computes one token for all that make tokens and a
share of the prompts that wait, in one forward.

Knows token ids only: no template, no terminal, no HTTP. One thread at a time may call an engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from alpaca_lora.errors import AlpacaLoraError, NumericalError, UserError
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import BlockTable
from alpaca_lora.inference.kv_cache import KVCache, choose_num_blocks
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.inference.request import Completion, Event, Request
from alpaca_lora.inference.runner import Runner
from alpaca_lora.inference.sampler import Choice, check_vocabulary, choose_many
from alpaca_lora.inference.scheduler import Scheduler
from alpaca_lora.inference.sequence import Sequence
from alpaca_lora.inference.step_batch import StepBatch
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing and has done since it was made; counts of tokens, of requests that have started.

    cache_usage: share of the blocks that sequences hold now. cached_tokens: how many of the prompt_tokens were found in
    the prefix cache, in which all of them are looked for.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    num_blocks: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    num_preemptions: int
    num_steps: int


class Engine:
    """Answers requests with one model, each with an adapter of ``bank`` or without one.

    max_running: sequences computed together; more wait their turn. step_tokens: tokens of one forward at most, decoded
    and prompts'; a longer prompt takes several, which bounds memory and the time that others wait for their next token.
    cache_bytes: of the keys and values of all of them, by default a quarter of the memory that can be taken now, and
    never more than ``max_running`` sequences of the model's context use. keep_prefixes: a call of `generate` or
    `stream` may use what an earlier one computed; only where nobody changes the model in between. Who adds requests one
    by one and changes the model calls `forget_prefixes`.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, *, bank: AdapterBank | None = None, max_running: int = 32,
        step_tokens: int = 2048, cache_bytes: int | None = None, keep_prefixes: bool = False,
    ) -> None:  # fmt: skip
        if step_tokens < max_running:
            raise UserError(
                f"is {step_tokens}", field="step_tokens", expected=f"at least max_running, which is {max_running}"
            )
        if bank is not None and model.prefix is not None:
            raise ValueError("the model has virtual tokens of its own: a bank's adapters cannot stand beside them")
        self.model, self.tokenizer, self._bank, self._keep_prefixes = model, tokenizer, bank, keep_prefixes
        self._num_positions = model.config.max_position_embeddings
        self._device = next(model.parameters()).device
        dynamic = [rope for rope in model.config.ropes if rope.kind == "dynamic"]
        self._reuse = not dynamic
        if dynamic:
            # dynamic NTK turns by the whole sequence's length, which it reads off a run of positions: a prompt is never
            # cut, begins nowhere but at its first token, and sequences are not decoded together, where the positions of
            # two could look like one run
            max_running = 1
            self._num_positions = max(self._num_positions, *(int(r.trained_positions * r.factor) for r in dynamic))
        dtype = model.embeddings.weight.dtype
        num_blocks = choose_num_blocks(
            model.config, dtype, self._device, cache_bytes=cache_bytes, num_sequences=max_running,
            num_places=self._num_positions,
        )  # fmt: skip
        self._pool = BlockPool(num_blocks)
        self._cache = KVCache(model.config, num_blocks, dtype=dtype, device=self._device)
        self._scheduler = Scheduler(
            self._pool, self._fill, max_running=max_running, step_tokens=step_tokens, cuts_prompts=self._reuse
        )
        self._runner = Runner(model, self._cache, bank)
        self._next_id = itertools.count()
        self._sequences: dict[int, Sequence] = {}  # all that have not ended, in the order in which they came
        self._parked: list[Event] = []  # events that nobody has been told
        self._own_prefix: Many[KeysValues] | None = None  # the model's, evaluated
        self._generation_tokens = self._num_steps = 0

    # ---- what may be asked

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the model has positions for, those of its prefix left out."""
        return self._num_positions - self.model.prefix_length

    def _context_behind(self, adapter: LoadedAdapter | None) -> int:
        """The same for requests with this adapter, whose virtual tokens take positions too."""
        return self.context_length - (0 if adapter is None else adapter.num_virtual)

    def _find(self, name: str | None) -> LoadedAdapter | None:
        """What the bank has under this name now; nobody counts as its user yet."""
        return None if name is None else self._adapters.get(name)

    @property
    def _adapters(self) -> AdapterBank:
        if self._bank is None:
            raise UserError("there are no adapters here", field="adapter")
        return self._bank

    def _check(self, request: Request, adapter: LoadedAdapter | None) -> None:
        """UserError for a request that can never be answered."""
        context = self._context_behind(adapter)
        num_tokens, ids = len(request.prompt_ids), request.prompt_ids
        if num_tokens == 0:
            raise UserError("has no tokens", field="prompt", expected="at least one token")
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UserError(
                f"has token {min(ids) if min(ids) < 0 else max(ids)}", field="prompt",
                expected=f"ids below the model's vocabulary of {vocab_size}",
                fix="check that tokenizer and model belong together",
            )  # fmt: skip
        check_vocabulary(request.params, vocab_size)
        if request.kind == "classify" and self.model.score is None and (adapter is None or not adapter.labels):
            raise UserError("classifies nothing", field="model", expected="a model or an adapter with a class head")
        if num_tokens + (request.kind == "generate") > context:
            num_virtual = self._num_positions - context
            behind = f" behind {num_virtual} virtual tokens" if num_virtual else ""
            raise UserError(
                f"has {num_tokens} tokens", field="prompt",
                expected=f"fewer than the model's context of {context} tokens{behind}", fix="shorten it",
            )  # fmt: skip
        # the last token of an answer is never read again
        num_places = self._num_positions - context + num_tokens + max(0, self._max_tokens(request, context) - 1)
        if self._pool.blocks_of(num_places) > self._pool.num_blocks:
            raise UserError(
                f"needs {num_places} places of the key/value cache for prompt and answer", field="prompt",
                expected=f"at most {self._pool.num_blocks * self._pool.block_size}",
                fix="shorten it, lower max_new_tokens or give the engine more cache_bytes",
            )  # fmt: skip

    @staticmethod
    def _max_tokens(request: Request, context: int) -> int:
        if request.kind == "classify":
            return 0
        return min(request.params.max_new_tokens, context - len(request.prompt_ids))

    # ---- requests one by one

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._parked or self._sequences)

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; the number that its events will have. It holds its adapter from now on.

        UserError for one that can never be answered, and whatever the bank raises for an adapter that is not there.
        """
        # held before anything is read of it: another one may get its name at any time
        adapter = None if request.adapter is None else self._adapters.acquire(request.adapter)
        try:
            self._check(request, adapter)
            context = self._context_behind(adapter)
            table = BlockTable(
                self._pool, "" if adapter is None else adapter.digest, request.salt, reuse=self._reuse
            )  # fmt: skip
            sequence = Sequence(
                next(self._next_id), request, self.tokenizer, table, max_tokens=self._max_tokens(request, context),
                device=self._device, adapter=adapter, num_virtual=self._num_positions - context,
            )  # fmt: skip
        except BaseException:
            self._release(adapter)
            raise
        self._sequences[sequence.index] = sequence
        self._scheduler.add(sequence)
        return sequence.index

    def cancel(self, index: int) -> None:
        """End a request now; the next `step` tells its completion. Nothing for one that has ended, which can happen in
        the moment in which its client goes away.
        """
        if (sequence := self._sequences.get(index)) is not None:
            self._end(sequence)
            self._parked.append(sequence.cancel())

    def step(self) -> list[Event]:
        """Compute once and tell what is new. A request whose logits are not finite, or whose grammar cannot go on, ends
        alone, with finish_reason `error`. Whatever else is raised: no request is lost, all begin again with the next
        step.
        """
        if self._sequences:
            try:
                self._compute()
            except BaseException:
                self._scheduler.restart(self._sequences.values())
                raise
        events, self._parked = self._parked, []
        return events

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        pool, scheduler = self._pool, self._scheduler
        return EngineStats(
            len(scheduler.running), len(scheduler.waiting), 1 - pool.num_free / pool.num_blocks, pool.num_blocks,
            scheduler.prompt_tokens, scheduler.cached_tokens, self._generation_tokens, scheduler.num_preemptions,
            self._num_steps,
        )  # fmt: skip

    def forget_prefixes(self) -> None:
        """What was computed so far is not used for requests that start from now on: the model has changed."""
        self._pool.forget()
        self._own_prefix = None

    # ---- requests in lists

    def generate(self, requests: Many[Request]) -> list[Completion]:
        """The answers, in the order of the requests. Errors as in `stream`."""
        completions = {e.index: e.completion for e in self.stream(requests) if e.completion is not None}
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Many[Request]) -> Iterator[Event]:
        """Events as text becomes certain; the last event of each request brings its completion. Close it to stop early.

        UserError for a prompt that is empty or leaves no room for a token in the model's context, or for a grammar that
        cannot go on; NumericalError for logits that are not finite. The index of an event is the place of its request
        in the list.
        """
        for request in requests:
            self._check(request, self._find(request.adapter))
        return self._run(requests)

    def _run(self, requests: Many[Request]) -> Iterator[Event]:
        if not self._keep_prefixes:
            self.forget_prefixes()
        places: dict[int, int] = {}
        try:
            for place, request in enumerate(requests):
                places[self.add(request)] = place
            num_open = len(places)
            while num_open:
                events = self.step()
                # those of whoever else uses this engine
                self._parked += [event for event in events if event.index not in places]
                for event in events:
                    if event.index not in places:
                        continue
                    done = event.completion
                    if done is not None and done.error is not None:
                        raise done.error
                    num_open -= done is not None
                    yield Event(places[event.index], event.text, done, event.token_ids, event.logprobs)
        finally:
            for index in places:
                self.cancel(index)
            self._parked = [event for event in self._parked if event.index not in places]

    # ---- one step

    @torch.inference_mode()
    def _compute(self) -> None:
        """One forward and a token for each row that is asked. Each event is parked as soon as it is true."""
        batch = StepBatch.of(self._scheduler.schedule(), self.model.prefix_length)
        logits = self._runner.run(batch)
        self._num_steps += 1
        sequences = batch.token_sequences
        outcomes = choose_many([s.sampler for s in sequences], logits.tokens_NV) if sequences else []
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            self._parked.append(self._push(sequence, outcome))
        for sequence, logits_C in zip(batch.class_sequences, logits.classes, strict=True):
            self._parked.append(self._classify(sequence, logits_C))

    def _push(self, sequence: Sequence, outcome: Choice | AlpacaLoraError) -> Event:
        if isinstance(outcome, AlpacaLoraError):
            return self._fail(sequence, outcome)
        self._generation_tokens += 1
        event = sequence.push(outcome.token_id, outcome.logprob)
        if event.completion is not None:
            self._end(sequence)
        return event

    def _classify(self, sequence: Sequence, logits_C: torch.Tensor) -> Event:
        class_logits = tuple(logits_C.tolist())
        if not all(map(math.isfinite, class_logits)):
            error = NumericalError("the class head's logits are not finite", fix="check the weights and the adapter")
            return self._fail(sequence, error)
        self._end(sequence)
        return sequence.classify(class_logits)

    def _fail(self, sequence: Sequence, error: AlpacaLoraError) -> Event:
        sequence.table.forget()
        self._end(sequence)
        return sequence.fail(error)

    def _end(self, sequence: Sequence) -> None:
        """Give back all that the sequence holds."""
        del self._sequences[sequence.index]
        self._scheduler.remove(sequence)
        self._release(sequence.adapter)

    def _release(self, adapter: LoadedAdapter | None) -> None:
        if adapter is not None:
            self._adapters.release(adapter)

    def _fill(self, sequence: Sequence, first: int) -> None:
        """Store the virtual tokens of the sequence's adapter, or of the model, from place ``first`` on."""
        adapter = sequence.adapter
        pairs = self._evaluate_own_prefix() if adapter is None else adapter.prefix
        assert pairs is not None
        self._cache.put(sequence.table.blocks, first, [(k_PKE[first:], v_PKE[first:]) for k_PKE, v_PKE in pairs])

    def _evaluate_own_prefix(self) -> Many[KeysValues]:
        """Keys and values of the model's prefix: once, until `forget_prefixes`."""
        if self._own_prefix is None:
            assert self.model.prefix is not None
            self._own_prefix = self.model.prefix.keys_values()
        return self._own_prefix
