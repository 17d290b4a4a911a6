"""What the routes share: the engine behind its bridge, the models, the limits, the log. Made once by `create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from alpaca_lora.inference.grammar import Grammar
from alpaca_lora.safety.audit import audit_line
from alpaca_lora.server.adapter_hold import held
from alpaca_lora.server.bridge import Bridge
from alpaca_lora.server.errors import ApiError, too_late, too_many
from alpaca_lora.server.json_body import parse, read_body
from alpaca_lora.server.keys import Caller
from alpaca_lora.server.lifecycle import Lifecycle
from alpaca_lora.server.limits import KeyLimits, Slot
from alpaca_lora.server.metrics import Metrics
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.server.protocol import Body
from alpaca_lora.server.question import Room
from alpaca_lora.server.rails import Note, PolicyOf, Rails
from alpaca_lora.server.request_log import RequestLog
from alpaca_lora.server.served_models import ServedModel, ServedModels
from alpaca_lora.server.unsupported import without_unsupported
from alpaca_lora.server.validation import validate
from alpaca_lora.server.workers import Workers

B = TypeVar("B", bound=Body)
BODY_SECONDS = 30.0
INLINE_BYTES = 16_384  # longer bodies are parsed away from the event loop


class Grammars(Protocol):
    """What makes an answer keep to a form; see `inference.grammar.GrammarCompiler`."""

    def json_object(self) -> Grammar: ...
    def json_schema(self, schema: object) -> Grammar: ...


@dataclass
class Turn:
    """One request that is being answered: whose it is, until when, and what it holds. `close` it exactly once."""

    request: Request
    caller: Caller
    slot: Slot
    lifecycle: Lifecycle
    deadline: float  # of the loop's clock
    facts: dict[str, Any]
    on_close: list[Callable[[], None]] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def close(self) -> None:
        for function in self.on_close:
            function()
        self.slot.release()
        self.lifecycle.leave()


@dataclass
class Service:
    """All that an answer needs. What rails do runs in ``rail_workers``, where it may wait for what ``workers`` do;
    adapters are read in ``loaders``, where nothing else waits behind them.
    """

    options: ServeOptions
    bridge: Bridge
    models: ServedModels
    workers: Workers
    rail_workers: Workers
    loaders: Workers
    grammars: Grammars
    policy_of: PolicyOf
    limits: KeyLimits
    metrics: Metrics
    lifecycle: Lifecycle
    log: RequestLog

    def enter(self, request: Request) -> Turn:
        """Begin to answer. ApiError 503 while draining, 429 over the caller's limits."""
        self.lifecycle.enter()
        try:
            caller: Caller = request.state.caller
            slot = self.limits.enter(caller)
        except ApiError:
            self.lifecycle.leave()
            raise
        deadline = asyncio.get_running_loop().time() + self.options.request_timeout
        return Turn(request, caller, slot, self.lifecycle, deadline, request.state.facts)

    async def read(self, request: Request, model: type[B], unsupported: Mapping[str, str] | None = None) -> B:
        """The validated body. ApiError for what is not one."""
        body = await read_body(request, max_bytes=int(self.options.max_body_mb * 1e6), seconds=BODY_SECONDS)

        def understood() -> B:
            return validate(model, without_unsupported(parse(body), unsupported or {}))

        return understood() if len(body) <= INLINE_BYTES else await self.workers.run(understood)

    @property
    def room(self) -> Room:
        """What every prompt has to fit into."""
        context_length = self.bridge.context_length
        return Room(context_length, context_length * self.models.longest_token)

    async def find_model(self, name: str) -> ServedModel:
        return await self.workers.run(self.models.find, name)

    def holding(self, model: ServedModel) -> AbstractAsyncContextManager[None]:
        """Its adapter is in memory inside; see `adapter_hold.held`."""
        return held(self.models.bank, self.loaders, model.adapter)

    def rails_of(self, model: ServedModel) -> Rails:
        return Rails(self.policy_of(model.adapter))

    def admit(self, count: int) -> None:
        """Room in the queue for so many more answers. ApiError 429, with the time after which to come back."""
        room = self.options.max_running + self.options.max_queue
        if self.bridge.num_open + count > room:
            waiting = max(0, self.bridge.num_open - self.options.max_running)
            # about one answer a second for each that is computed: it only has to be the right order
            raise too_many(
                f"The queue is full: {self.bridge.num_open} of {room} answers are asked for already",
                min(60.0, 1 + waiting / self.options.max_running), "queue_full",
            )  # fmt: skip

    def audit(self, turn: Turn, notes: Iterable[Note]) -> None:
        """What the rails found in a request and its answers, a line each."""
        for note in notes:
            request_id = turn.request.state.request_id
            line = audit_line(
                note.verdict, request_id=request_id, side=note.side, num_characters=note.num_characters
            )  # fmt: skip
            self.log.audit(line)

    def late(self) -> ApiError:
        return too_late(self.options.request_timeout)
