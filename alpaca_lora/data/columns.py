"""Which columns of a table, or fields of an object, hold the text and the label. Knows names, numbers and a file's
first rows; reads no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alpaca_lora.data.classes import is_number, plain_label
from alpaca_lora.data.delimited import NAMES, Dialect
from alpaca_lora.data.formats import shown_fields
from alpaca_lora.errors import DataError, nearest

TEXT_NAMES = ("text", "sentence", "review", "content", "comment", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "intent", "sentiment")
NUMBER_NAMES = ("id", "idx", "index", "number")  # beside a text these are no labels: a file to be labelled
HEAD_ROWS = 200  # rows that decide which of two columns without names holds the labels
ENOUGH_ROWS = 8  # below a first row whose label is a word that comes once: then that word is a name


@dataclass(frozen=True)
class LabelKeys:
    """Explicit names of the fields or columns, or numbers of columns from 1; None: detected."""

    text: str | None = None
    label: str | None = None

    @property
    def number_label(self) -> bool:
        """Whether the label's column is given by its number: who does that says that there is no header."""
        return self.label is not None and self.label.isdecimal()


@dataclass
class RunColumns:
    """What the files of a run share: ``first``, (how many columns, the text's, the label's) of its first table."""

    first: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column (from 0) is the text's and which the label's; their names, in words, for messages."""

    text: int
    label: int
    has_header: bool
    text_name: str
    label_name: str

    def describe(self, names: Sequence[str]) -> str:
        if not self.has_header:
            return f"no header; the text is in {self.text_name}, the label in {self.label_name}"
        left = [name for number, name in enumerate(names) if number not in (self.text, self.label)]
        tail = f"; {shown_fields(left)} not read" if left else ""
        return f"the text is in {self.text_name!r}, the label in {self.label_name!r}{tail}"


def choose_columns(
    head: Sequence[list[str]], keys: LabelKeys, dialect: Dialect, file: str, line: int,
    first: tuple[int, int, int] | None = None,
) -> Columns:  # fmt: skip
    """Which columns are read, from the file's first rows.

    The first row is a header if it holds the names that are asked for, or names known for a text and for a label; of
    two columns one name is enough. Without a header the columns are those of ``first`` (`RunColumns`) in a table of as
    many; else the keys may be numbers of columns; of two, the label's is the one with fewer different values. Raises
    DataError where that does not say which.
    """
    names = [cell.strip().strip('"') for cell in head[0]]
    if len(names) < 2:
        raise DataError(
            "the row has one column",
            file=file,
            line=line,
            expected=f"text and label, with {NAMES[dialect.delimiter]} between them",
        )
    text = _place(keys.text, TEXT_NAMES, head, names)
    label = _place(keys.label, LABEL_NAMES, head, names)
    has_header = text.named or label.named
    if not has_header and first is not None and first[0] == len(names):
        return _unnamed(*first[1:])
    if len(names) == 2:
        if text.at is None and label.at is None and keys == LabelKeys():
            return _unnamed(*_fewer_values(head))
        if text.at is None and label.at is not None and keys.text is None:
            text = _Place(1 - label.at, False)
        elif label.at is None and text.at is not None and keys.label is None:
            other = 1 - text.at
            label = _Place(None if names[other].casefold() in NUMBER_NAMES else other, False)
    if text.at is None:
        raise _missing(keys.text, TEXT_NAMES, names, "text", file, line)
    if label.at is None:
        raise _missing(keys.label, LABEL_NAMES, names, "label", file, line)
    if text.at == label.at:
        raise DataError(
            f"text and label are both in column {text.at + 1}", file=file, line=line, fix="name both with their keys"
        )
    if not has_header:
        return _unnamed(text.at, label.at)
    return Columns(text.at, label.at, True, names[text.at], names[label.at])


def lone_first_label(head: Sequence[list[str]], columns: Columns) -> str | None:
    """The label of the first row if it looks like the name of its column: a word over numbers, or the only one that
    comes once, over `ENOUGH_ROWS` rows at least.
    """
    first, *rest = (plain_label(row[columns.label].strip()) for row in head)
    counts = Counter(rest)
    if not first or first in counts or len(rest) < 2:
        return None
    over_numbers = not is_number(first) and all(map(is_number, counts))
    return first if over_numbers or (len(rest) >= ENOUGH_ROWS and min(counts.values()) > 1) else None


def unknown_header(columns: Columns, names: Sequence[str], label: str, file: str, line: int) -> DataError:
    """What to say of a first row whose label is `lone_first_label`."""
    text, name = names[columns.text].strip(), names[columns.label].strip()
    shown = text if len(text) <= 40 else f"{text[:39]}…"
    return DataError(
        f"the first row, {shown!r} and {label!r}, looks like a header: no other row has that label",
        file=file,
        line=line,
        expected="names known for a text and a label, or no header",
        fix=f"if it is one, name its columns: text_key {shown!r}, label_key {name!r}; if it is a row, number them: "
        f"text_key {columns.text + 1}, label_key {columns.label + 1}",
    )


def pick_name(
    asked: str | None, known: Sequence[str], names: Sequence[str] | dict[str, Any], what: str, file: str, line: int
) -> str:
    """The name among ``names`` that was asked for, or the first known one, whatever its case. DataError without."""
    if found := _find(asked, known, names):
        return found
    raise _missing(asked, known, names, what, file, line)


def _missing(
    asked: str | None, known: Sequence[str], names: Sequence[str] | dict[str, Any], what: str, file: str, line: int
) -> DataError:
    """Nothing among ``names`` is the ``what`` that was asked for, or that is known by its name."""
    there = ", ".join(repr(name) for name in list(names)[:12]) or "none"
    if asked is not None:
        alike = nearest(asked, names)
        return DataError(
            "is missing",
            file=file,
            line=line,
            field=asked,
            expected=f"the column that {what}_key names",
            fix=f"did you mean {alike[0]!r}?" if alike else f"there are {there}",
        )
    return DataError(
        f"no column is known to hold the {what}: {there}",
        file=file,
        line=line,
        expected=f"one named {', '.join(known)}",
        fix=f"name it with {what}_key",
    )


def _find(asked: str | None, known: Sequence[str], names: Sequence[str] | dict[str, Any]) -> str | None:
    wanted = known if asked is None else (asked,)
    if asked is not None and asked in names:
        return asked
    folded = {name.strip().casefold(): name for name in reversed(list(names))}
    return next((folded[word.casefold()] for word in wanted if word.casefold() in folded), None)


class _Place(NamedTuple):
    """A column; ``named``: the first row holds its name."""

    at: int | None
    named: bool


def _place(key: str | None, known: Sequence[str], head: Sequence[list[str]], names: list[str]) -> _Place:
    """Where the column is that ``key`` names or numbers, or one that is known by its name. What stands in its column
    again further down is no name.
    """
    if found := _find(key, known, names):
        at = names.index(found)
        if key is not None or all(len(row) <= at or row[at].strip() != found for row in head[1:]):
            return _Place(at, True)
    if key is not None and key.isdecimal() and 1 <= int(key) <= len(names):
        at = int(key) - 1
        return _Place(at, names[at].casefold() in known)
    return _Place(None, False)


def _unnamed(text: int, label: int) -> Columns:
    return Columns(text, label, False, f"column {text + 1}", f"column {label + 1}")


def _fewer_values(head: Sequence[list[str]]) -> tuple[int, int]:
    """(text, label) of two columns: labels repeat themselves, or are much shorter; the second where neither tells."""
    values = [{row[column].strip() for row in head} for column in (0, 1)]
    counts = [len(words) for words in values]
    lengths = [sum(map(len, words)) / len(words) for words in values]
    first = counts[0] < counts[1] or (counts[0] == counts[1] and 2 * lengths[0] < lengths[1])
    return (1, 0) if first else (0, 1)
