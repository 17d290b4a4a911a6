"""SIGINT, SIGTERM and SIGUSR1 become a flag that long loops poll; knows nothing of what they do then.

The first signal asks for an orderly end, the second one of any kind ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal came; raised by `SignalFlag.check` where it is safe to stop, and turned into `Stopped` by who saved
    the state.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class SignalFlag:
    """A context that holds the three signals back; ``check`` raises `Interrupted` once one has come.

    Handlers belong to the main thread: in another thread the context changes nothing, and ``check`` never raises.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(
                128 + number
            )  # no clean-up: checkpoints are whole at every instant, and a stuck one must not hold us
        self.received = number
        name = signal.Signals(number).name
        # os.write: the interrupted code may hold the lock of sys.stderr's buffer
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"\n{name}: saving, then stopping; again: stop now\n".encode(),
        )
