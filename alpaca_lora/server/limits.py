"""How much one caller may ask for: requests in a minute, and requests at once. Knows no HTTP but its errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from alpaca_lora.server.errors import too_many
from alpaca_lora.server.keys import Caller


@dataclass
class _Usage:
    """tokens: requests that may come at once (a bucket that fills with time); at: when it was last filled."""

    tokens: float
    at: float
    running: int = 0


class KeyLimits:
    """A bucket and a count for each caller; ``clock`` is in seconds. 0 switches a limit off."""

    def __init__(
        self, *, requests_per_minute: int = 0, max_concurrency: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute, self._max_concurrency, self._clock = requests_per_minute, max_concurrency, clock
        self._usage: dict[str, _Usage] = {}  # callers are the keys of the ring: few

    def enter(self, caller: Caller) -> Slot:
        """Count one more request until the slot is given back. ApiError 429 when the caller has had its share."""
        now = self._clock()
        usage = self._usage.setdefault(caller.name, _Usage(self._per_minute, now))
        if self._max_concurrency and usage.running >= self._max_concurrency:
            raise too_many(
                f"At most {self._max_concurrency} requests at once with one key", 1.0, "concurrency_exceeded"
            )
        if self._per_minute:
            rate = self._per_minute / 60
            usage.tokens = min(self._per_minute, usage.tokens + (now - usage.at) * rate)
            usage.at = now
            if usage.tokens < 1:
                raise too_many(f"At most {self._per_minute} requests a minute with one key", (1 - usage.tokens) / rate)
            usage.tokens -= 1
        usage.running += 1
        return Slot(usage)

    def running(self, caller: Caller) -> int:
        usage = self._usage.get(caller.name)
        return 0 if usage is None else usage.running


class Slot:
    """One running request; `release` gives it back, once, however often it is called."""

    def __init__(self, usage: _Usage) -> None:
        self._usage: _Usage | None = usage

    def release(self) -> None:
        if self._usage is not None:
            self._usage.running -= 1
            self._usage = None
