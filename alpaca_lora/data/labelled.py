"""A file of labelled texts -> `Conversation`s of kind ``labelled``. Knows the names of fields and columns; nothing of
tokens, and not which labels there are.

A file is a table (``.tsv``, ``.tab``, ``.csv``, with or without a header) or JSON (lines or an array of objects). The
first row decides which columns are read. A label is a word or a number; each row has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alpaca_lora.data.delimited import NAMES, TABLE_SUFFIXES, Dialect, read_table
from alpaca_lora.data.files import OnBytes, inner_suffix
from alpaca_lora.data.formats import BadRow, OnNote, json_records, kind_of, note_unread, shown_fields, text_field
from alpaca_lora.data.records import Record
from alpaca_lora.errors import DataError, nearest
from alpaca_lora.text.messages import Conversation, labelled

TEXT_NAMES = ("text", "sentence", "review", "content", "comment", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "intent", "sentiment")
NUMBER_NAMES = ("id", "idx", "index", "number")  # beside a text these are no labels: a file to be labelled
LABEL_CHARACTERS = 200
HEAD_ROWS = 200  # rows that decide which of two columns without names holds the labels
MAX_CANDIDATES = 10_000

Making = Callable[[Any, str, int], Conversation]  # row, file, line


@dataclass(frozen=True)
class LabelKeys:
    """Explicit names of the fields or columns, or numbers of columns from 1; None: detected."""

    text: str | None = None
    label: str | None = None


def read_labelled(
    path: Path, keys: LabelKeys | None = None, on_bytes: OnBytes | None = None, on_note: OnNote | None = None
) -> Iterator[Conversation | BadRow]:
    """Every row of the file, bad ones in place: no text, no label, another number of columns, a quote that is not
    closed.

    Raises DataError where nothing more can be read, where the columns are not known, and where quotes that are not
    balanced have joined rows.
    """
    keys = keys or LabelKeys()
    if inner_suffix(path) in TABLE_SUFFIXES:
        yield from _read_table(path, keys, on_bytes, on_note)
    else:
        yield from _read_json(path, keys, on_bytes, on_note)


def label_word(value: Any, file: str, line: int, name: str) -> str:
    """The label as text: 1 and "1" are the same label, true is "true". DataError for what is no label."""
    expected = "a word or a number"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and value == value:
        return str(value)
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
    return word


def _text(text: str, file: str, line: int, name: str) -> str:
    if not text.strip():
        raise DataError("is empty", file=file, line=line, field=name, expected="a text to classify")
    return text


# ---- JSON


def _read_json(
    path: Path, keys: LabelKeys, on_bytes: OnBytes | None, on_note: OnNote | None
) -> Iterator[Conversation | BadRow]:
    name, making, fields = str(path), None, ()
    unread: dict[str, None] = {}
    count = 0
    for record in json_records(path, f"{', '.join(TABLE_SUFFIXES)}, JSON or JSON lines", on_bytes):
        count += 1
        if record.error is not None:
            yield BadRow(record.error, record.line, record.raw)
            continue
        try:
            row = record.value
            if not isinstance(row, dict):
                raise DataError(
                    f"the row is {kind_of(row)}", file=name, line=record.line, expected="an object with named fields"
                )
            if making is None:
                fields = _pick_fields(row, keys, name, record.line)
                making = _field_reader(*fields)
            note_unread(row, fields, unread)
            yield making(row, name, record.line)
        except DataError as error:
            yield BadRow(error, record.line, str(record.value))
    if not count:
        raise DataError("the file holds no rows", file=path, expected="at least one")
    if on_note and fields:
        _say_fields(on_note, fields, unread)


def _pick_fields(row: dict[str, Any], keys: LabelKeys, file: str, line: int) -> tuple[str, str]:
    """(field of the text, field of the label)."""
    return (
        _pick_name(keys.text, TEXT_NAMES, row, "text", file, line),
        _pick_name(keys.label, LABEL_NAMES, row, "label", file, line),
    )


def _pick_name(
    asked: str | None, known: Sequence[str], names: Sequence[str] | dict[str, Any], what: str, file: str, line: int
) -> str:
    """The name among ``names`` that was asked for, or the first known one, whatever its case."""
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


def _field_reader(text: str, label: str) -> Making:
    def make(row: dict[str, Any], file: str, line: int) -> Conversation:
        content = _text(text_field(row, text, file, line), file, line, text)
        if label not in row:
            raise DataError("is missing", file=file, line=line, field=label, expected="a word or a number")
        return labelled(content, label_word(row[label], file, line, label), file=file, line=line)

    return make


def _say_fields(on_note: OnNote, fields: Sequence[str], unread: dict[str, None]) -> None:
    left = f"; {shown_fields(unread)} not read" if unread else ""
    on_note(f"the text is in {fields[0]!r}, the label in {fields[1]!r}{left}")


# ---- tables


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column (from 0) is the text's and which the label's; their names, in words, for messages."""

    text: int
    label: int
    has_header: bool
    text_name: str
    label_name: str

    def conversation(self, cells: list[str], file: str, line: int) -> Conversation:
        text = _text(cells[self.text], file, line, self.text_name)
        return labelled(text, label_word(cells[self.label], file, line, self.label_name), file=file, line=line)

    def describe(self, names: Sequence[str]) -> str:
        if not self.has_header:
            return f"no header; the text is in {self.text_name}, the label in {self.label_name}"
        left = [name for number, name in enumerate(names) if number not in (self.text, self.label)]
        tail = f"; {shown_fields(left)} not read" if left else ""
        return f"the text is in {self.text_name!r}, the label in {self.label_name!r}{tail}"


def _read_table(
    path: Path, keys: LabelKeys, on_bytes: OnBytes | None, on_note: OnNote | None
) -> Iterator[Conversation | BadRow]:
    name = str(path)
    dialect, records = read_table(path, on_bytes)
    head = list(itertools.islice(records, HEAD_ROWS))
    first = next((record for record in head if record.error is None), None)
    if first is None:
        yield from (BadRow(record.error, record.line, record.raw) for record in head if record.error)
        raise DataError("the file holds no rows", file=path, expected="at least one")
    columns = choose_columns([record.value for record in head if record.error is None], keys, dialect, name, first.line)
    if on_note:
        on_note(columns.describe(first.value))
    joined = _JoinedRows(columns, dialect)
    count = 0
    for record in itertools.chain(head, records):
        if columns.has_header and record is first:
            continue
        count += 1
        if record.error is not None:
            yield BadRow(record.error, record.line, record.raw)
            continue
        try:
            conversation = columns.conversation(record.value, name, record.line)
        except DataError as error:
            yield BadRow(error, record.line, dialect.delimiter.join(record.value))
            continue
        joined.see(record)
        yield conversation
    if not count:
        raise DataError("the file holds no rows", file=path, expected="at least one below the header")
    joined.check(path)


def choose_columns(head: Sequence[list[str]], keys: LabelKeys, dialect: Dialect, file: str, line: int) -> Columns:
    """Which columns are read, from the file's first rows.

    The first row is a header if it holds the names that are asked for, or names known for a text and for a label.
    Without one, the keys may be numbers of columns; of two columns, the label's is the one with fewer different
    values. Raises DataError where that does not say which.
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


@dataclass
class _JoinedRows:
    """Rows over several lines of which a line is a row by itself: a quote at its beginning was never meant to open.

    A line counts as a row when it has all columns, quotes left aside, and its label is a label of other rows.
    """

    columns: Columns
    dialect: Dialect
    labels: set[str] = field(default_factory=set)
    candidates: list[tuple[int, int, str]] = field(default_factory=list)  # line of the row, of the line, its label

    def see(self, record: Record) -> None:
        if not record.raw:
            self.labels.add(record.value[self.columns.label].strip())
            return
        for number, text in enumerate(record.raw.split("\n")[:-1], record.line):
            cells = text.split(self.dialect.delimiter)
            if len(cells) == len(record.value) and len(self.candidates) < MAX_CANDIDATES:
                self.candidates.append((record.line, number, cells[self.columns.label]))

    def check(self, path: Path) -> None:
        for opening, line, label in self.candidates:
            if label in self.labels:
                raise DataError(
                    f"a quote that opens here makes one row of several lines, though line {line} is a row by itself",
                    file=path,
                    line=opening,
                    expected="balanced quotes",
                    fix="double or remove the quote, or save the file as TSV without quotes",
                )
