"""Which rows an optimizer step sees, and which of them share a micro-batch: pure functions of (seed, step). Knows no
model.

An epoch is a permutation of the table; step ``n`` takes the next ``batch_size`` rows of it, the last step of an epoch
what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample
from alpaca_lora.data.packing import pack_best_fit, pack_by_length


class Table(Protocol):
    """What is needed of `table.ExampleTable`."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedExample: ...


class Loader:
    """Batches of a table.

    batch_size: rows of one optimizer step. token_budget: most tokens of one micro-batch (a longer row is one by
    itself). group_by_length: within a step, rows of like length share a micro-batch (else best fit); never which rows
    a step sees.
    """

    def __init__(
        self, table: Table, *, batch_size: int, token_budget: int, seed: int, group_by_length: bool = False
    ) -> None:
        if not len(table):
            raise ValueError("a table without examples")
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} rows: at least 1")
        self.table, self.batch_size, self.token_budget, self.seed = table, batch_size, token_budget, seed
        self._pack = pack_by_length if group_by_length else pack_best_fit
        self._order = lru_cache(maxsize=2)(self._permutation)  # a run crosses one epoch's end at a time

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.table) // self.batch_size)

    def step_rows(self, step: int) -> np.ndarray:
        """int64: the rows that optimizer step ``step`` (from 0, over all epochs) learns from."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def step_batch(self, step: int) -> StepBatch:
        """The micro-batches of one optimizer step. Every step costs the same: resuming seeks, it does not replay."""
        batches = tuple(self._batches(self.step_rows(step)))
        return StepBatch(step=step, epoch=step // self.steps_per_epoch, micro_batches=batches)

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, in an order that never changes: rows of like length of the whole table share a batch."""
        for group in pack_by_length(self.table.lengths, self.token_budget):
            yield Batch.pack([self.table[row] for row in group])

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        return generator.permutation(len(self.table))

    def _batches(self, rows: np.ndarray) -> Iterator[Batch]:
        for group in self._pack(self.table.lengths[rows], self.token_budget):
            yield Batch.pack([self.table[int(rows[position])] for position in group])
