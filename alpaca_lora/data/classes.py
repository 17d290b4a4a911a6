"""Which labels there are, and their numbers: from the words of the rows to classes 0, 1, 2 ...

A row keeps the number of its word in the order of the file; which words are classes, and in which order, is only known
when it is decided which rows train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from alpaca_lora.data.formats import kind_of
from alpaca_lora.data.row_set import RowSet
from alpaca_lora.data.table import ExampleTable
from alpaca_lora.errors import DataError, nearest
from alpaca_lora.text.messages import Conversation

LABEL_CHARACTERS = 200
MAX_LABELS = 10_000
MAX_SHOWN = 10  # labels named in a message
LOPSIDED = 10  # times as many rows of one class as of another: worth a message
_WHOLE = re.compile(r"([+-]?\d+)\.0*")  # 1.0, as tables are written that once had holes
_TRUTH = ("true", "false")


def label_word(value: Any, file: str, line: int, name: str) -> str:
    """The label of a row as `plain_label` spells it. DataError for what is no label."""
    expected = "a word or a number"
    if isinstance(value, bool | int) or (isinstance(value, float) and value == value):
        return plain_label(str(value))
    if not isinstance(value, str):
        what = "is NaN" if isinstance(value, float) else f"is {kind_of(value)}"
        raise DataError(what, file=file, line=line, field=name, expected=expected)
    word = value.strip()
    if not word:
        raise DataError("is empty", file=file, line=line, field=name, expected=expected)
    if len(word) > LABEL_CHARACTERS:
        raise DataError(
            f"has {len(word):,} characters",
            file=file,
            line=line,
            field=name,
            expected=f"a label of {LABEL_CHARACTERS} at most",
            fix="name the column of the labels with label_key",
        )
    return plain_label(word)


def plain_label(word: str) -> str:
    """One spelling of what is one label: 1.0 is 1, True and TRUE are true; every other word is itself."""
    if whole := _WHOLE.fullmatch(word):
        return whole[1]
    return word.casefold() if word.casefold() in _TRUTH else word


def is_number(word: str) -> bool:
    """Whether the label is a finite number."""
    return _value(word) is not None


class LabelNumbers:
    """A number for each word, in the order they come; ``words``: the words by their number."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, row: Conversation) -> int:
        """The number of a labelled row's label. DataError above MAX_LABELS: these are not labels."""
        word = row.messages[1].content
        if word not in self._numbers:
            if len(self.words) == MAX_LABELS:
                raise DataError(
                    f"there are more than {MAX_LABELS:,} different labels",
                    file=row.file,
                    line=row.line,
                    field="label_key",
                    fix="name the column of the labels",
                )
            self._numbers[word] = len(self.words)
            self.words.append(word)
        return self._numbers[word]


def class_names(words: Sequence[str]) -> tuple[str, ...]:
    """The labels in the order of their class numbers: by value if all are numbers, else by the alphabet."""
    values = [_value(word) for word in words]
    if None not in values:
        return tuple(word for _, word in sorted(zip(values, words, strict=True)))
    return tuple(sorted(words))


def _value(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def class_of_label(words: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """int64: the class of each word, -1 where it is none of ``names``."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(word, -1) for word in words], dtype=np.int64)


def keep_rare_in_training(train: RowSet, is_val_N: np.ndarray, messages: list[str]) -> None:
    """Take out of ``is_val_N`` the rows of labels that would only validate, and those of equal hash."""
    label_N, hash_N = train.column("label"), train.column("normalised")
    rare = np.setdiff1d(label_N[is_val_N], label_N[train.chosen_N & ~is_val_N])
    if len(rare):
        is_val_N &= ~np.isin(hash_N, hash_N[np.isin(label_N, rare)])
        names = some([train.labels[label] for label in rare])
        messages.append(f"labels with so few rows that none of them validates: {names}")


def count_contradictions(one: RowSet, messages: list[str]) -> None:
    """Rows whose text other rows give another label are kept, counted and told of: nobody knows which is right."""
    if not one.labels:
        return
    at_N = np.flatnonzero(one.chosen_N)
    _, first_N = np.unique(one.identity_N()[at_N], return_index=True)  # rows of one text and label count once
    texts, num_labels = np.unique(one.column("exact")[at_N][first_N], return_counts=True)
    found_N = at_N[np.isin(one.column("exact")[at_N], texts[num_labels > 1])]
    for column in one.rows.columns_N[found_N]:
        one.ledger.note(int(column["file"]), int(column["line"]), "contradictory", "label")
    one.ledger.contradictory = len(found_N)
    if len(found_N):
        column = one.rows.columns_N[found_N[0]]
        where = f"{one.ledger.files[int(column['file'])]}:{int(column['line'])}"
        messages.append(
            f"{len(found_N):,} rows have a text that other rows give another label, the first at {where}: all are kept"
        )


def choose_classes(train: RowSet, val: RowSet | None, is_val_N: np.ndarray, messages: list[str]) -> tuple[str, ...]:
    """The labels of the training rows. DataError when there is one only, or a validation row has another."""
    used = np.unique(train.column("label")[train.chosen_N & ~is_val_N])
    labels = class_names([train.labels[label] for label in used])
    if len(labels) < 2:
        raise DataError(
            f"all training rows have the label {''.join(labels)!r}",
            file=train.ledger.files[0],
            expected="rows of two classes at least",
            fix="name the column of the labels with label_key, or add rows of other classes",
        )
    if val is not None:
        unseen_N = class_of_label(val.labels, labels)[val.column("label")] < 0
        if (unseen_N & val.chosen_N).any():
            column = val.rows.columns_N[np.flatnonzero(unseen_N & val.chosen_N)[0]]
            word = val.labels[int(column["label"])]
            alike = nearest(word, labels)
            raise DataError(
                f"no training row has the label {word!r}",
                file=val.ledger.files[int(column["file"])],
                line=int(column["line"]),
                expected=f"one of {some(labels)}",
                fix=f"did you mean {alike[0]!r}?" if alike else None,
            )
    num_rows = int(np.count_nonzero(train.chosen_N & ~is_val_N))
    if len(labels) > 2 and 2 * len(labels) > num_rows:
        messages.append(f"{len(labels):,} labels for {num_rows:,} training rows: is label_key the right column?")
    return labels


def count_classes(table: ExampleTable | None, labels: tuple[str, ...]) -> tuple[int, ...]:
    """Rows of each class."""
    if table is None or table.classes_N is None:
        return ()
    return tuple(np.bincount(table.classes_N, minlength=len(labels)).tolist())


def tell_classes(
    labels: tuple[str, ...], class_counts: tuple[int, ...], val_class_counts: tuple[int, ...], messages: list[str]
) -> None:
    """Say what makes figures misleading: classes that do not validate, classes of very different size."""
    missing = [label for label, count in zip(labels, val_class_counts, strict=False) if not count]
    if missing:
        messages.append(f"no validation row has the label {some(missing)}: the figures say nothing of it")
    if labels and max(class_counts) >= LOPSIDED * min(class_counts):
        rarest, most = (labels[class_counts.index(pick(class_counts))] for pick in (min, max))
        messages.append(
            f"{most!r} has {max(class_counts):,} training rows, {rarest!r} {min(class_counts):,}: accuracy alone says "
            "little, look at macro-F1"
        )


def some(labels: Sequence[str]) -> str:
    """The first labels, for a message."""
    return ", ".join(map(repr, labels[:MAX_SHOWN])) + (", ..." if len(labels) > MAX_SHOWN else "")
