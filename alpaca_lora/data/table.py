"""Encoded rows as columns, and the tables that training and validation index. Knows no text and no options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alpaca_lora.data.example import TokenizedExample

# one entry per example. row: number of the row it came from, over all files. exact, normalised: `split.row_hash`,
# `normalised_hash`. flags: of the row. straddling: tokens over a response's border. label: number of the row's label
# in the list that the entry keeps, -1 without one
TRUNCATED, IS_TEXT, ENDS, SPELLS_SPECIAL, LABELLED = 1, 2, 4, 8, 16
NO_LABEL = -1
COLUMNS = np.dtype(
    [
        ("line", "<i8"),
        ("row", "<i8"),
        ("exact", "<u8"),
        ("normalised", "<u8"),
        ("length", "<i4"),
        ("num_supervised", "<i4"),
        ("file", "<i4"),
        ("straddling", "<i4"),
        ("flags", "<i4"),
        ("label", "<i4"),
    ]
)


@dataclass(frozen=True)
class EncodedRows:
    """All examples of a set of files, end to end, in the order of the files.

    ids_T: int32, supervised_T: bool, both as a rule memory-mapped; columns_N: COLUMNS; starts_N: int64, the first
    token of each.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    columns_N: np.ndarray
    starts_N: np.ndarray

    @classmethod
    def of(cls, ids_T: np.ndarray, supervised_T: np.ndarray, columns_N: np.ndarray) -> EncodedRows:
        ends_N = np.cumsum(columns_N["length"], dtype=np.int64)
        return cls(ids_T, supervised_T, columns_N, ends_N - columns_N["length"])

    def __len__(self) -> int:
        return len(self.columns_N)


class ExampleTable:
    """Some of the examples, by position: what a `Loader` reads.

    lengths, num_supervised: int32, per example. classes_N: int64, the class of each, of texts to classify; else None.
    Reading an example copies nothing but its own tokens.
    """

    def __init__(self, rows: EncodedRows, chosen_N: np.ndarray, class_of_label: np.ndarray | None = None) -> None:
        """class_of_label: class number of each number in the column ``label``."""
        self._rows = rows
        self._chosen_N = np.asarray(chosen_N, dtype=np.int64)
        self.lengths: np.ndarray = rows.columns_N["length"][self._chosen_N]
        self.num_supervised: np.ndarray = rows.columns_N["num_supervised"][self._chosen_N]
        self.classes_N: np.ndarray | None = None
        if class_of_label is not None:
            self.classes_N = np.asarray(class_of_label, dtype=np.int64)[rows.columns_N["label"][self._chosen_N]]

    def __len__(self) -> int:
        return len(self._chosen_N)

    def __getitem__(self, index: int) -> TokenizedExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        at = int(self._chosen_N[index])
        start = int(self._rows.starts_N[at])
        end = start + int(self._rows.columns_N["length"][at])
        label = None if self.classes_N is None else int(self.classes_N[index])
        return TokenizedExample(
            self._rows.ids_T[start:end], self._rows.supervised_T[start:end], index % len(self), label
        )

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.num_supervised.sum(dtype=np.int64))

    def origin(self, index: int) -> tuple[int, int]:
        """(file number, line) the example came from; the file's name is ``ledger.files[number]``."""
        column = self._rows.columns_N[self._chosen_N[index]]
        return int(column["file"]), int(column["line"])

    @classmethod
    def from_examples(cls, examples: Sequence[TokenizedExample]) -> ExampleTable:
        """A table in memory, for tests and small sets."""
        columns_N = np.zeros(len(examples), COLUMNS)
        columns_N["length"] = [example.num_tokens for example in examples]
        columns_N["num_supervised"] = [example.num_supervised for example in examples]
        columns_N["row"] = np.arange(len(examples))
        columns_N["label"] = [NO_LABEL if example.label is None else example.label for example in examples]
        ids_T = np.concatenate([example.ids_T for example in examples]).astype(np.int32)
        supervised_T = np.concatenate([example.supervised_T for example in examples]).astype(bool)
        most = int(columns_N["label"].max())
        rows = EncodedRows.of(ids_T, supervised_T, columns_N)
        return cls(rows, np.arange(len(examples)), None if most == NO_LABEL else np.arange(most + 1))
