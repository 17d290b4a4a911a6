"""An engine and a bank without a model: the interfaces of the real ones, answers that can be foretold, time by hand."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.errors import AdapterError, AlpacaLoraError, UserError
from alpaca_lora.inference.request import Completion, Event, FinishReason, Request, Times, TokenLogprob
from alpaca_lora.inference.stop_strings import StopStrings
from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.tokenizer import Tokenizer

EOS = 257


def says(request: Request) -> str:
    """Who answers what, and the first number of the seed."""
    question = bytes(i for i in request.prompt_ids if i < 256).decode("utf-8", "replace")
    seed = "" if request.params.seed is None else f" [{request.params.seed}]"
    return f"{request.adapter or 'base'} heard {len(question)} characters{seed}"


@dataclass
class _Answer:
    request: Request
    ids: list[int]
    detokenizer: Detokenizer
    stops: StopStrings
    text: str = ""
    made: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class FakeEngine:
    """Says what ``answer`` says, a token of each running request in a step, in bytes.

    gate: cleared, the next step waits until it is set again, as a long computation would. seconds: of a step.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, answer: Callable[[Request], str] = says, context_length: int = 512,
        max_running: int = 4, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.tokenizer, self.answer, self.context_length = tokenizer, answer, context_length
        self.max_running, self.seconds = max_running, seconds
        self.num_blocks = 1_000_000
        self.gate = threading.Event()
        self.gate.set()
        self.is_computing = threading.Event()
        self.seen: list[Request] = []
        self.cancelled: list[int] = []
        self.poison: Exception | None = None  # raised by the next steps
        self.failure: AlpacaLoraError | None = None  # with which answers end
        self._next = 0
        self._answers: dict[int, _Answer] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._answers)

    def add(self, request: Request) -> int:
        if len(request.prompt_ids) >= self.context_length:
            raise UserError("is too long", field="prompt")
        self.seen.append(request)
        self._next += 1
        ids = [*self.answer(request).encode(), EOS]
        self._answers[self._next] = _Answer(
            request, ids, Detokenizer(self.tokenizer), StopStrings(request.params.stop)
        )  # fmt: skip
        return self._next

    def cancel(self, index: int) -> None:
        self.cancelled.append(index)
        self._answers.pop(index, None)

    def step(self) -> list[Event]:
        self.is_computing.set()
        self.gate.wait()
        time.sleep(self.seconds)
        if self.poison is not None:
            raise self.poison
        running = list(self._answers.items())[: self.max_running]
        return [self._push(index, one) for index, one in running]

    def stats(self) -> SimpleNamespace:
        running = min(self.max_running, len(self._answers))
        return SimpleNamespace(
            num_running=running, num_waiting=len(self._answers) - running, cache_usage=running / self.max_running,
            prompt_tokens=40, cached_tokens=8, num_preemptions=0, num_blocks=self.num_blocks,
        )  # fmt: skip

    def _push(self, index: int, one: _Answer) -> Event:
        params = one.request.params
        if one.request.kind == "classify":
            del self._answers[index]
            done = Completion("", (), "stop", len(one.request.prompt_ids), class_logits=(0.0, 2.0))
            return Event(index, "", done)
        if self.failure is not None:
            del self._answers[index]
            return Event(index, "", Completion("", (), "error", len(one.request.prompt_ids), error=self.failure))
        token = one.ids[len(one.made)]
        one.made.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in params.stop_ids:
            text, reason = one.stops.push(one.detokenizer.flush()) + one.stops.flush(), "stop"
        else:
            text = one.stops.push(one.detokenizer.push(token))
            if one.stops.found:
                reason = "stop"
            elif len(one.made) >= params.max_new_tokens:
                text, reason = text + one.stops.flush(), "length"
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            top = tuple((token + i, -0.5 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        one.text += text
        one.logprobs += logprobs
        if reason is None:
            return Event(index, text, None, (token,), logprobs)
        del self._answers[index]
        done = Completion(
            one.text, tuple(one.made), reason, len(one.request.prompt_ids), 3, tuple(one.logprobs) or None,
            times=Times(0.25, 0.5, 1.0),
        )  # fmt: skip
        return Event(index, text, done, (token,), logprobs)


@dataclass(eq=False)
class FakeAdapter:
    name: str
    folder: Path
    record: AdapterRecord | None = None
    method: str = "lora"
    digest: str = "d" * 64
    num_bytes: int = 1000
    num_virtual: int = 0
    labels: tuple[str, ...] = ()
    is_resident: bool = True


class FakeBank:
    """Names and nothing behind them; a folder called ``broken`` cannot be loaded."""

    def __init__(self, *adapters: FakeAdapter) -> None:
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.users: Counter[FakeAdapter] = Counter()

    def names(self) -> list[str]:
        return list(self.adapters)

    def get(self, name: str) -> FakeAdapter:
        if name not in self.adapters:
            raise AdapterError("is not loaded", field="name")
        return self.adapters[name]

    def load(self, name: str, folder: Path, *, pinned: bool = False) -> FakeAdapter:
        if folder.name == "broken":
            raise AdapterError("rank 8 is not that of the weights", file=folder, field="r")
        if not name.isascii() or ".." in name or "/" in name:
            raise AdapterError("bad adapter name", field="name")
        self.adapters[name] = FakeAdapter(name, folder)
        return self.adapters[name]

    def unload(self, name: str) -> None:
        self.get(name)
        del self.adapters[name]

    def acquire_resident(self, name: str) -> FakeAdapter | None:
        return self.acquire(name)

    def acquire(self, name: str) -> FakeAdapter:
        adapter = self.get(name)
        self.users[adapter] += 1
        return adapter

    def release(self, adapter: FakeAdapter) -> None:
        assert self.users[adapter] > 0
        self.users[adapter] -= 1
