"""The process around the application: its socket, and an orderly end.

SIGTERM or SIGINT: no new answers, those that run may finish within the limit, the others end with an error event, then
the process. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from alpaca_lora.errors import MachineError
from alpaca_lora.server.errors import unavailable
from alpaca_lora.server.http_guard import GuardedProtocol
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.server.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOODBYE_SECONDS = 2.0  # for the last events to be written
GRACEFUL_SECONDS = 3  # for open connections, after that
SPARE_CONNECTIONS = 512  # beside those of answers: health checks, the page, whoever is told to come back
MAX_UNREAD_HEAD_BYTES = 65536  # of a head that has not ended; a whole one has the limit of `frame`


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. MachineError when the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise MachineError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}", field="port",
            fix="choose another port or host",
        ) from error  # fmt: skip
    return bound


class Listener(uvicorn.Server):
    """Runs the application until a signal; ``received`` is its number, ``was_drained`` whether all answers ended."""

    def __init__(self, app: FastAPI, options: ServeOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=GuardedProtocol, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
                server_header=False, proxy_headers=False, timeout_keep_alive=30,
                timeout_graceful_shutdown=GRACEFUL_SECONDS,
                limit_concurrency=options.max_running + options.max_queue + SPARE_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_UNREAD_HEAD_BYTES,
            )
        )  # fmt: skip
        self._service: Service = app.state.service
        self._drain_seconds = options.drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.received: int | None = None
        self.was_drained = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised once more: the command says how it ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + sig)  # nothing here needs saving, and a stuck step must not hold us
        self.received = sig
        name = signal.Signals(sig).name
        # os.write: the interrupted code may hold the lock of sys.stderr's buffer
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"\n{name}: finishing the answers that run, then stopping; again: stop now\n".encode(),
        )
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self.drain())

    async def drain(self) -> None:
        """Until the last answer has ended, in one way or the other."""
        service = self._service
        self.was_drained = await service.lifecycle.drain(self._drain_seconds)
        if not self.was_drained:
            service.bridge.abort(unavailable("The server is shutting down", "shutting_down"))
            await service.lifecycle.until_idle(GOODBYE_SECONDS)
        self.should_exit = True
