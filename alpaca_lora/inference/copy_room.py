"""The memory that the float32 copies of all threads take (`adapter_stack`), beside that of the adapters themselves.

Knows stacks and bytes; who has to leave for them, the bank decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet


class Copies(Protocol):
    """What this room asks of an `AdapterStack`."""

    @property
    def num_bytes(self) -> int: ...
    def clear(self) -> None: ...


class CopyRoom:
    """``lock``: the bank's; `num_bytes` and `clear` are for who holds it. free_up(bytes), called with it: whether so
    many more fit now.
    """

    def __init__(self, lock: threading.Lock, free_up: Callable[[int], bool]) -> None:
        self._lock, self._free_up = lock, free_up
        self._stacks: WeakSet[Copies] = WeakSet()  # one of each thread, gone with it

    def join(self, stack: Copies) -> None:
        with self._lock:
            self._stacks.add(stack)

    @contextmanager
    def claim(self, num_bytes: int) -> Iterator[bool]:
        """Whether so many bytes may be taken; they must be in the stack when this ends."""
        with self._lock:
            yield self._free_up(num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(stack.num_bytes for stack in self._stacks)

    def clear(self) -> None:
        """Give up all copies; they are made again when they are asked for and there is room."""
        for stack in self._stacks:
            stack.clear()
