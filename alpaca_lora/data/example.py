"""One tokenized row: the noun that encode, cache and loader share. Does not know torch, files or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as token ids.

    ids_T: int32. supervised_T: bool, True where the token is a target. The first token of a row is never a target.
    index: position of the row in its table, stable over epochs and runs; it keys the row's randomness.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    index: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_T[1:].sum())
