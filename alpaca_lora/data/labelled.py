"""A file of labelled texts -> `Conversation`s of kind ``labelled``. Knows nothing of tokens, and not which labels there
are; which columns are read is in `columns.py`.

A file is a table (``.tsv``, ``.tab``, ``.csv``, with or without a header) or JSON (lines or an array of objects). A
label is a word or a number; each row has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_lora.data.classes import label_word
from alpaca_lora.data.columns import (
    HEAD_ROWS,
    LABEL_NAMES,
    TEXT_NAMES,
    Columns,
    LabelKeys,
    RunColumns,
    choose_columns,
    lone_first_label,
    pick_name,
    unknown_header,
)
from alpaca_lora.data.delimited import TABLE_SUFFIXES, Dialect, read_table
from alpaca_lora.data.files import OnBytes, inner_suffix
from alpaca_lora.data.formats import BadRow, OnNote, json_records, kind_of, note_unread, shown_fields, text_field
from alpaca_lora.data.records import Record
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation, labelled

MAX_CANDIDATES = 10_000

Making = Callable[[Any, str, int], Conversation]  # row, file, line


def read_labelled(
    path: Path, keys: LabelKeys | None = None, on_bytes: OnBytes | None = None, on_note: OnNote | None = None,
    run_columns: RunColumns | None = None,
) -> Iterator[Conversation | BadRow]:  # fmt: skip
    """Every row of the file, bad ones in place: no text, no label, another number of columns, a quote that is not
    closed. ``run_columns``: of the files read before; filled in by the first table.

    Raises DataError where nothing more can be read, where the columns are not known, and where quotes that are not
    balanced have joined rows.
    """
    keys = keys or LabelKeys()
    if inner_suffix(path) in TABLE_SUFFIXES:
        yield from _read_table(path, keys, on_bytes, on_note, run_columns or RunColumns())
    else:
        yield from _read_json(path, keys, on_bytes, on_note)


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
        pick_name(keys.text, TEXT_NAMES, row, "text", file, line),
        pick_name(keys.label, LABEL_NAMES, row, "label", file, line),
    )


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


def _read_table(
    path: Path, keys: LabelKeys, on_bytes: OnBytes | None, on_note: OnNote | None, run_columns: RunColumns
) -> Iterator[Conversation | BadRow]:
    name = str(path)
    dialect, records = read_table(path, on_bytes)
    head = list(itertools.islice(records, HEAD_ROWS))
    first = next((record for record in head if record.error is None), None)
    if first is None:
        yield from (BadRow(record.error, record.line, record.raw) for record in head if record.error)
        raise DataError("the file holds no rows", file=path, expected="at least one")
    rows = [record.value for record in head if record.error is None]
    columns = choose_columns(rows, keys, dialect, name, first.line, run_columns.first)
    run_columns.first = run_columns.first or (len(first.value), columns.text, columns.label)
    told = columns.describe(first.value)
    if not columns.has_header and (odd := lone_first_label(rows, columns)) is not None:
        if not keys.number_label:
            raise unknown_header(columns, first.value, odd, name, first.line)
        told += f"; the first row is a row, and the only one labelled {odd!r} among the first {len(rows):,}"
    if on_note:
        on_note(told)
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
            conversation = _row_of_cells(record.value, columns, name, record.line)
        except DataError as error:
            yield BadRow(error, record.line, dialect.delimiter.join(record.value))
            continue
        joined.see(record)
        yield conversation
    if not count:
        raise DataError("the file holds no rows", file=path, expected="at least one below the header")
    joined.check(path)


def _row_of_cells(cells: list[str], columns: Columns, file: str, line: int) -> Conversation:
    text = _text(cells[columns.text], file, line, columns.text_name)
    return labelled(text, label_word(cells[columns.label], file, line, columns.label_name), file=file, line=line)


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
