"""One tokenized row: the noun that encode, cache and loader share. Does not know torch, files or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as token ids.

    ids_T: int32. supervised_T: bool, True where the token is a target. The first token of a row is never a target.
    index: position of the row in its table, stable over epochs and runs; it keys the row's randomness.
    label: the number of its class, of a text to classify: then no token is a target, the last one is classified, and
    supervised_T marks it.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    index: int
    label: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_T[1:].sum()) if self.label is None else 1
