"""The nouns that meet the model: one micro-batch, one optimizer step's worth of them (a row is in `example.py`,
without torch).

Labels of tokens are not stored: a token that is supervised is its own label, predicted from the token before it. The
one place that shifts is `Batch.pack`. A text to classify has one label, its class, predicted from its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alpaca_lora.data.example import TokenizedExample

__all__ = ["Batch", "StepBatch", "TokenizedExample"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: a stream of T tokens made of segments; no padding, no batch axis.

    ids_T, positions_T: int64; positions restart at 0 in each segment. lengths: tokens of each segment, sum T.
    label_rows_N: int64, the rows t whose next token is supervised. label_ids_N: int64, that next token. Of texts to
    classify: the last row of each segment, and its class.
    example_T: int64, the row of the table each token came from (with positions_T it keys dropout, so that how rows
    are cut into micro-batches never changes the randomness). indices: the rows of the table, one per segment.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    lengths: tuple[int, ...]
    label_rows_N: torch.Tensor
    label_ids_N: torch.Tensor
    example_T: torch.Tensor
    indices: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised(self) -> int:
        return len(self.label_ids_N)

    @classmethod
    def pack(cls, examples: Sequence[TokenizedExample]) -> Batch:
        """Lay the examples end to end. A segment's first token is never a label, so nothing leaks over a border."""
        ids_T = np.concatenate([e.ids_T for e in examples]).astype(np.int64)
        lengths = tuple(e.num_tokens for e in examples)
        label_rows_N, label_ids_N = _labels(examples, ids_T)
        return cls(
            ids_T=torch.from_numpy(ids_T),
            positions_T=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
            lengths=lengths,
            label_rows_N=torch.from_numpy(label_rows_N),
            label_ids_N=torch.from_numpy(label_ids_N),
            example_T=torch.from_numpy(np.repeat(np.array([e.index for e in examples], dtype=np.int64), lengths)),
            indices=tuple(e.index for e in examples),
        )


def _labels(examples: Sequence[TokenizedExample], ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that predict, what they predict): next tokens, or the class at each segment's end."""
    ends = np.cumsum([e.num_tokens for e in examples])
    classes = [e.label for e in examples if e.label is not None]
    if classes:
        assert len(classes) == len(examples), "texts to classify and others in one batch"
        return ends - 1, np.array(classes, dtype=np.int64)
    supervised_T = np.concatenate([e.supervised_T for e in examples])
    supervised_T[[0, *ends[:-1]]] = False
    target_N = np.flatnonzero(supervised_T)
    return target_N - 1, ids_T[target_N]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimizer step. ``num_supervised`` is the divisor of the loss (design, section 4)."""

    step: int
    epoch: int
    micro_batches: tuple[Batch, ...]

    @property
    def num_examples(self) -> int:
        return sum(len(b.lengths) for b in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        return sum(b.num_tokens for b in self.micro_batches)

    @property
    def num_supervised(self) -> int:
        return sum(b.num_supervised for b in self.micro_batches)
