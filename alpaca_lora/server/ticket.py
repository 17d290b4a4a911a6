"""The answers to one HTTP request while they come: a bounded buffer between the engine's thread and the one who reads.

Everything here happens on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from alpaca_lora.inference.request import Event
from alpaca_lora.server.errors import ApiError

MAX_BUFFERED = 1024  # events; a reader that is so far behind is given up


class Ticket:
    """Iterate for (place, event): the place is that of the request in the list that was submitted.

    Close it when nobody reads any more: what still runs is cancelled.
    """

    def __init__(self, num_places: int, cancel: Callable[[Ticket, Iterable[int]], None]) -> None:
        self.open_places = set(range(num_places))  # whose completion has not been read off the engine
        self._cancel = cancel
        self._buffer: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self.closed = False

    def put(self, place: int, event: Event) -> None:
        """From the bridge: the next event of a place. Too many that nobody took: all ends in an error."""
        if event.completion is not None:
            self.open_places.discard(place)
        if self.closed or self._error is not None:
            return
        if len(self._buffer) >= MAX_BUFFERED:
            self._buffer.clear()
            self.fail(ApiError(503, "The answer was not read fast enough", kind="server_error", code="slow_reader"))
            return
        self._buffer.append((place, event))
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """The reader gets what has come and then the error; what still runs is cancelled."""
        if self._error is None:
            self._error = error
        self.cancel(self.open_places)
        self._wake.set()

    def cancel(self, places: Iterable[int]) -> None:
        """Nobody wants the rest of these places."""
        wanted = self.open_places.intersection(places)
        self.open_places -= wanted
        if wanted:
            self._cancel(self, wanted)
        self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._buffer.clear()
        self.cancel(self.open_places)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while True:
            while self._buffer:
                yield self._buffer.popleft()
            if self._error is not None:
                raise self._error
            if not self.open_places:
                return
            self._wake.clear()
            await self._wake.wait()
