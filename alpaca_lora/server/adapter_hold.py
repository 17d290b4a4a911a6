"""An adapter that stays in memory while its requests are handed to the engine. One that had left for others is read
again in a loader thread: the engine's own thread reads no files, so the answers that run go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from alpaca_lora.errors import AdapterError, AlpacaLoraError, MachineError
from alpaca_lora.server.errors import ApiError, of_error, unavailable, unknown_model
from alpaca_lora.server.served_models import Bank, LoadedAdapter
from alpaca_lora.server.workers import Workers


@asynccontextmanager
async def held(bank: Bank, loaders: Workers, name: str | None) -> AsyncIterator[None]:
    """Inside, the adapter of this name (None: nothing to hold) is in memory. ApiError 404 for one that was unloaded,
    503 for one that cannot be read again or finds no room.
    """
    if name is None:
        yield
        return
    try:
        adapter = bank.acquire_resident(name) or await _read(bank, loaders, name)
    except AlpacaLoraError as error:
        raise _told(error, name) from error
    try:
        yield
    finally:
        bank.release(adapter)


async def _read(bank: Bank, loaders: Workers, name: str) -> LoadedAdapter:
    reading = asyncio.ensure_future(loaders.run(bank.acquire, name))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        # who asked is gone; the thread goes on, and what it acquires must be given back
        reading.add_done_callback(lambda done: _let_go(bank, done))
        raise


def _let_go(bank: Bank, reading: asyncio.Future[LoadedAdapter]) -> None:
    if not reading.cancelled() and reading.exception() is None:
        bank.release(reading.result())


def _told(error: AlpacaLoraError, name: str) -> ApiError:
    if isinstance(error, AdapterError) and error.field == "name":
        return unknown_model(name)
    if isinstance(error, MachineError):
        return of_error(error)
    # its folder is not what it was when it was loaded, which is no fault of who asks
    return unavailable(f"The adapter {name!r} cannot be read again: {error.what}", "adapter_unreadable")
