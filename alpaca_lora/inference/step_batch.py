"""One step as the model gets it: a packed stream of tokens, where each segment's cache is, which rows are asked."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.inference.paged_plan import Segment
from alpaca_lora.inference.scheduler import Chunk
from alpaca_lora.inference.sequence import Sequence


@dataclass(slots=True)
class StepBatch:
    """ids, positions: of each row of the stream. segments: runs of rows of one sequence each. adapters: (adapter,
    number of rows), in stream order, each adapter once. token_rows, class_rows: rows whose token or class is wanted, of
    the sequences token_sequences and class_sequences.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    adapters: list[tuple[LoadedAdapter | None, int]] = field(default_factory=list)
    token_rows: list[int] = field(default_factory=list)
    token_sequences: list[Sequence] = field(default_factory=list)
    class_rows: list[int] = field(default_factory=list)
    class_sequences: list[Sequence] = field(default_factory=list)

    @classmethod
    def of(cls, chunks: Many[Chunk], first_position: int = 0) -> StepBatch:
        """``first_position``: positions that the model itself adds, those of its own prefix."""
        batch = cls()
        for chunk in _by_adapter(chunks):
            batch._add(chunk, first_position)
        return batch

    def _add(self, chunk: Chunk, first_position: int) -> None:
        sequence, start, count = chunk
        stop = start + count
        self.ids += sequence.ids[start:stop]
        self.positions += range(start - first_position, stop - first_position)
        self.segments.append(Segment(sequence.table.blocks, start, count))
        if self.adapters and self.adapters[-1][0] is sequence.adapter:
            count += self.adapters.pop()[1]
        self.adapters.append((sequence.adapter, count))
        if stop == len(sequence.ids):
            classified = sequence.request.kind == "classify"
            rows, sequences = (
                (self.class_rows, self.class_sequences) if classified else (self.token_rows, self.token_sequences)
            )
            rows.append(len(self.ids) - 1)
            sequences.append(sequence)


def _by_adapter(chunks: Many[Chunk]) -> Many[Chunk]:
    """The chunks of one adapter behind each other, adapters and their chunks in the order in which they come."""
    order: dict[int, int] = {}
    for chunk in chunks:
        order.setdefault(id(chunk.sequence.adapter), len(order))
    return chunks if len(order) == 1 else sorted(chunks, key=lambda chunk: order[id(chunk.sequence.adapter)])
