"""From ready to drained: whether new requests are taken, and how many are being answered."""

from __future__ import annotations

import asyncio
from typing import Literal

from alpaca_lora.server.errors import unavailable

State = Literal["starting", "ready", "draining"]


class Lifecycle:
    """``num_active``: requests that are being answered; a streaming one until its last byte."""

    def __init__(self) -> None:
        self.state: State = "starting"
        self.num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """One more request is answered. ApiError 503 where no new ones are taken."""
        if self.state != "ready":
            raise unavailable(f"The server is {self.state}", self.state, retry_after=5)
        self.num_active += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_active -= 1
        if self.num_active == 0:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take no new requests and wait for those that run; False when some still do after ``seconds``."""
        self.state = "draining"
        return await self.until_idle(seconds)

    async def until_idle(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
