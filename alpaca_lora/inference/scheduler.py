"""Who computes what in the next step: sequences that run go on, oldest first, then those that wait begin.

One step has at most ``step_tokens`` tokens: one for each sequence that makes tokens, and what is left of them for
prompts, cut where they do not fit. When blocks run out the youngest sequence gives its own back and waits in front of
all others; it computes again what it had, its sampler stays as it is, so its answer is the same. Knows no model, no
tensors and no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.sequence import Sequence


class Chunk(NamedTuple):
    """``count`` places of a sequence, from place ``start`` on."""

    sequence: Sequence
    start: int
    count: int


class Scheduler:
    """``waiting`` in the order in which they come to their turn, ``running`` in the order in which they came.

    fill(sequence, first): store keys and values of the sequence's virtual tokens from place ``first`` on; called before
    anything reads them. cuts_prompts False: a prompt is one chunk, however long.
    """

    def __init__(
        self, pool: BlockPool, fill: Callable[[Sequence, int], None], *, max_running: int, step_tokens: int,
        cuts_prompts: bool = True,
    ) -> None:  # fmt: skip
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prompt_tokens = self.cached_tokens = 0  # of sequences that have started
        self._pool, self._fill = pool, fill
        self._max_running, self._step_tokens, self._cuts_prompts = max_running, step_tokens, cuts_prompts

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn. Its places have to fit the pool, or it would wait for ever."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, in whatever way."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.table.release()
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step. Its places count as filled from now on; if it is not run to its end, `restart`."""
        chunks = self._go_on()
        return chunks + self._admit(self._step_tokens - sum(chunk.count for chunk in chunks))

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """A step broke off, nobody knows where: all blocks are free and unknown, and ``sequences``, all that have not
        ended, in the order in which they came, begin again.
        """
        self._pool.clear()
        self.running.clear()
        self.waiting = deque(sequences)
        for sequence in self.waiting:
            sequence.table.drop()

    def _go_on(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        # one token for each that makes tokens is set aside, so that an older prompt does not hold them up
        room = self._step_tokens - sum(sequence.num_pending == 1 for sequence in self.running)
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            pending = sequence.num_pending
            count = 1 if pending == 1 else min(pending, room)
            if count > 0 and self._make_room(sequence, sequence.table.length + count):
                chunks.append(self._chunk(sequence, count))
                room -= count if pending > 1 else 0
        return chunks

    def _make_room(self, sequence: Sequence, num_places: int) -> bool:
        """Blocks for so many places, at the cost of younger sequences; False when it had to give up itself."""
        while self._pool.num_free < sequence.table.missing(num_places):
            youngest = self.running.pop()
            youngest.table.release()
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
            if youngest is sequence:
                return False
        sequence.table.reserve(num_places)
        return True

    def _admit(self, room: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self.waiting and room > 0 and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._seat(sequence):
                break
            self.running.append(self.waiting.popleft())
            count = min(sequence.num_pending, room) if self._cuts_prompts else sequence.num_pending
            chunks.append(self._chunk(sequence, count))
            room -= count
        return chunks

    def _seat(self, sequence: Sequence) -> bool:
        """Blocks for all it has, as many as possible of those that are known; False when there are not enough."""
        table, ids = sequence.table, sequence.ids
        num_found = table.match(ids)
        # a block for each that runs is left over: one that begins only to give up in a moment computes for nothing
        if self._pool.num_free < table.missing(len(ids)) + len(self.running):
            table.release()
            return False
        table.reserve(len(ids))
        if sequence.num_cached is None:
            # only the first start counts: what a sequence that gave up finds again was not saved
            num_cached = max(0, num_found - sequence.num_virtual)
            sequence.begin(num_cached)
            self.cached_tokens += num_cached
            self.prompt_tokens += len(ids) - sequence.num_virtual
        if num_found < sequence.num_virtual:
            self._fill(sequence, num_found)
            table.advance(ids, sequence.num_virtual - num_found)
        return True

    @staticmethod
    def _chunk(sequence: Sequence, count: int) -> Chunk:
        """The sequence's next places, which its blocks have room for."""
        start = sequence.table.length
        sequence.table.advance(sequence.ids, count)
        return Chunk(sequence, start, count)
