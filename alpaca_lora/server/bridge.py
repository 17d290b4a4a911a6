"""The engine in a thread of its own, and the event loop beside it: they talk by queues, and the loop never waits.

Only this thread touches the engine. The loop puts commands into a queue that the thread empties between two steps;
what a step made goes back by one call into the loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alpaca_lora.inference.block_pool import BLOCK_SIZE
from alpaca_lora.inference.request import Event, Request
from alpaca_lora.server.errors import ApiError, internal, unavailable
from alpaca_lora.server.ticket import Ticket

MAX_FAILED_STEPS = 3


class Engine(Protocol):
    """What the bridge asks of an engine; see `inference.engine.Engine`."""

    @property
    def context_length(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, index: int) -> None: ...
    def step(self) -> list[Event]: ...
    def stats(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Add:
    ticket: Ticket
    requests: tuple[Request, ...]
    accepted: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Cancel:
    ticket: Ticket
    places: frozenset[int]


class Bridge:
    """Start it inside of the running loop. ``num_open``: sequences that were submitted and have not ended; ``stats``:
    the engine's, as of its last step; ``failure``: what ended the engine's thread, nothing is answered after that.
    """

    def __init__(self, engine: Engine, *, on_failure: Callable[[BaseException], None]) -> None:
        self._engine, self._on_failure = engine, on_failure
        self._inbox: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tickets: set[Ticket] = set()
        self._owners: dict[int, tuple[Ticket, int]] = {}  # the thread's own: the engine's number -> whose place it is
        self.num_open = 0
        self.stats = engine.stats()
        self.failure: BaseException | None = None

    @property
    def context_length(self) -> int:
        """Of the model, or what the engine's cache has room for where that is less."""
        return min(self._engine.context_length, self.stats.num_blocks * BLOCK_SIZE)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, seconds: float) -> bool:
        """End all that is open and, after its step, the thread; False when that takes longer (it dies with the
        process)."""
        error = unavailable("The server is shutting down", "shutting_down")
        self.abort(error)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        self._refuse_waiting(error)
        return not self._thread.is_alive()

    # ---- the loop's side

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Give requests to the engine, all or none; raises what `Engine.add` raises for one of them."""
        if self.failure is not None:
            raise unavailable("The engine has stopped after an error", "engine_failed")
        ticket = Ticket(len(requests), self._post_cancel)
        accepted: asyncio.Future[None] = self.loop.create_future()
        self._tickets.add(ticket)
        self.num_open += len(requests)
        self._inbox.put(_Add(ticket, tuple(requests), accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            ticket.close()
            raise
        return ticket

    def abort(self, error: ApiError) -> None:
        """End everything that is open with an error."""
        for ticket in list(self._tickets):
            ticket.fail(error)

    def _post_cancel(self, ticket: Ticket, places: Iterable[int]) -> None:
        self._inbox.put(_Cancel(ticket, frozenset(places)))

    def _deliver(self, events: Sequence[tuple[Ticket, int, Event]], stats: Any) -> None:
        self.stats = stats
        for ticket, place, event in events:
            ticket.put(place, event)
            if event.completion is not None:
                self._ended(ticket, 1)

    def _ended(self, ticket: Ticket, count: int) -> None:
        self.num_open -= count
        if not ticket.open_places:
            self._tickets.discard(ticket)

    def _accept(self, command: _Add) -> None:
        if not command.accepted.done():
            command.accepted.set_result(None)

    def _refuse(self, command: _Add, error: Exception) -> None:
        command.ticket.open_places.clear()
        self._ended(command.ticket, len(command.requests))
        if not command.accepted.done():
            command.accepted.set_exception(error)

    def _fail_some(self, error: Exception, gone: Sequence[Ticket]) -> None:
        """A ticket for each of its places that were computed."""
        self._on_failure(error)
        for ticket in gone:
            ticket.fail(internal())
            self._ended(ticket, 1)

    def _fail_all(self, error: BaseException) -> None:
        self._on_failure(error)
        self.abort(internal())
        self._refuse_waiting(internal())
        self._tickets.clear()
        self.num_open = 0

    def _refuse_waiting(self, error: ApiError) -> None:
        """What nobody will take out of the queue any more."""
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, _Add):
                self._refuse(command, error)

    # ---- the thread's side

    def _run(self) -> None:
        """A step that raises ends the answers that were in it; several of them in a row end the engine."""
        num_failed = 0
        try:
            while self._take_commands():
                try:
                    events = self._engine.step()
                except Exception as error:
                    num_failed += 1
                    if num_failed == MAX_FAILED_STEPS:
                        raise
                    self._give_up_running(error)
                else:
                    if self._hand_out(events):
                        num_failed = 0
        except BaseException as error:
            self.failure = error
            self._post(self._fail_all, error)

    def _give_up_running(self, error: Exception) -> None:
        for index in self._owners:
            self._engine.cancel(index)
        gone = [ticket for ticket, _ in self._owners.values()]
        self._owners.clear()
        self._post(self._fail_some, error, gone)

    def _take_commands(self) -> bool:
        """All that wait; where the engine has nothing to do, until it has. False: the end."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, _Add):
                self._add(command)
            else:
                self._drop(command)
            if not self._engine.has_work:
                self._post(self._deliver, (), self._engine.stats())

    def _add(self, command: _Add) -> None:
        added: list[int] = []
        try:
            if command.ticket.closed:
                raise internal()  # nobody reads it: who closed the ticket is gone
            for request in command.requests:
                added.append(self._engine.add(request))
        except Exception as error:
            for index in added:
                self._engine.cancel(index)
            self._post(self._refuse, command, error)
            return
        self._owners |= {index: (command.ticket, place) for place, index in enumerate(added)}
        self._post(self._accept, command)

    def _drop(self, command: _Cancel) -> None:
        dropped = [
            index
            for index, (ticket, place) in self._owners.items()
            if ticket is command.ticket and place in command.places
        ]
        for index in dropped:
            del self._owners[index]
            self._engine.cancel(index)
        self._post(self._ended, command.ticket, len(dropped))

    def _hand_out(self, events: Sequence[Event]) -> int:
        """The number of events that somebody waits for."""
        told: list[tuple[Ticket, int, Event]] = []
        for event in events:
            owner = self._owners.get(event.index)
            if owner is None:
                continue  # cancelled meanwhile
            if event.completion is not None:
                del self._owners[event.index]
            told.append((*owner, event))
        self._post(self._deliver, told, self._engine.stats())
        return len(told)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *args)
