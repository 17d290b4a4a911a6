"""The encoded rows of a set of files, and which are left while duplicates, overlaps and the split are decided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alpaca_lora.data.ledger import Ledger
from alpaca_lora.data.table import EncodedRows
from alpaca_lora.text.messages import Conversation

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: spreads small numbers over 64 bits


@dataclass(frozen=True)
class RowSet:
    """The encoded rows of a set of files, and which of them are left (``chosen_N``: bool)."""

    rows: EncodedRows
    ledger: Ledger
    samples: dict[int, Conversation]
    key: str
    from_cache: bool
    chosen_N: np.ndarray
    labels: list[str]  # by the numbers of the column ``label``

    def drop(self, doomed_N: np.ndarray, reason: str) -> int:
        """Take examples out; returns how many rows that are."""
        doomed_N = doomed_N & self.chosen_N
        columns = self.rows.columns_N[doomed_N]
        _, first_N = np.unique(columns["row"], return_index=True)
        for column in columns[first_N]:
            self.ledger.drop(int(column["file"]), int(column["line"]), reason)
        self.chosen_N[doomed_N] = False
        return len(first_N)

    def column(self, name: str) -> np.ndarray:
        return self.rows.columns_N[name]

    def identity_N(self) -> np.ndarray:
        """Equal for equal rows, labels included."""
        with np.errstate(over="ignore"):
            return self.column("exact") + (self.column("label") + 1).astype(np.uint64) * _ODD
