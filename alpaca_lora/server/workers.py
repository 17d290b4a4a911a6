"""Threads for what takes time and is not the engine's: long texts, templates, grammars, files. The loop never waits."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """A few threads; more work waits its turn."""

    def __init__(self, num_threads: int = 4) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="server-worker")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``function`` returns or raises, computed in a worker."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(function, *args, **kwargs))

    def close(self) -> None:
        """No more work; what has begun ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
