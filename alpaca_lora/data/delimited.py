"""TSV and CSV bytes -> rows of cells, each with the line it begins on. Knows no column names and no labels.

Quotes are where such files lose rows: a quote that only opens swallows the lines up to the next one. So the whole file
is looked at before its quotes mean anything (TSV), and a cell that is not closed as RFC 4180 wants it costs its own
line only (CSV).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from alpaca_lora.data.files import CHUNK_BYTES, OnBytes, inner_suffix, read_chunks
from alpaca_lora.data.records import EXCERPT, Record, not_utf8, read_lines
from alpaca_lora.errors import DataError

TAB_SUFFIXES, TABLE_SUFFIXES = (".tsv", ".tab"), (".tsv", ".tab", ".csv")
CSV_DELIMITERS = (",", "\t", ";")  # in the order they are tried on a .csv file
NAMES = {",": "a comma", "\t": "a tab", ";": "a semicolon"}
MAX_ROW = 4 << 20  # characters; a quoted cell above it was never meant to go on
SNIFFED_LINES = 50


@dataclass(frozen=True, slots=True)
class Dialect:
    """quoting ``none``: a quote is a character like others; ``cells``: each line is a row, cells that are wholly in
    quotes are taken out of them; ``rows``: RFC 4180, a quoted cell may hold delimiters and line ends.
    """

    delimiter: str
    quoting: Literal["none", "cells", "rows"]


class Line(NamedTuple):
    """A line without its end; ``error`` instead when it is no text."""

    number: int
    text: str
    error: DataError | None = None


def read_table(path: Path, on_bytes: OnBytes | None = None) -> tuple[Dialect, Iterator[Record]]:
    """(how the file is written, its rows). A row's value is a list of cells, as many as in the first row; of a row that
    spans several lines ``raw`` holds these lines.

    A row with another number of cells, a quote that is not closed, bytes that are not UTF-8: a Record with an error,
    and reading goes on. Blank lines are not rows.
    """
    dialect = _tab_dialect(path) if inner_suffix(path) in TAB_SUFFIXES else _csv_dialect(path)
    return dialect, _equally_wide(_rows(_lines(path, on_bytes), dialect, path), dialect, path)


def _lines(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Line]:
    for number, offset, data in read_lines(read_chunks(path, on_bytes), MAX_ROW):
        if data is None:
            error = DataError(f"the line is longer than {MAX_ROW:,} bytes", file=path, line=number, fix="split it")
            yield Line(number, "", error)
            continue
        try:
            yield Line(number, data.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            told = not_utf8(error, data, offset, path, number)
            yield Line(number, data.decode("utf-8", "replace"), told)


def _rows(lines: Iterator[Line], dialect: Dialect, path: Path) -> Iterator[Record]:
    if dialect.quoting == "rows":
        yield from _quoted_rows(lines, dialect.delimiter, path)
        return
    for number, text, error in lines:
        if error is not None:
            yield Record(number, None, error, text)
        elif text.strip():
            cells = text.split(dialect.delimiter)
            yield Record(number, [_unquoted(cell) for cell in cells] if dialect.quoting == "cells" else cells)


def _equally_wide(records: Iterator[Record], dialect: Dialect, path: Path) -> Iterator[Record]:
    width = 0
    for record in records:
        if record.error is None:
            width = width or len(record.value)
            if len(record.value) != width:
                error = DataError(
                    f"has {len(record.value)} columns",
                    file=path,
                    line=record.line,
                    expected=f"{width}, as in the first row (divided by {NAMES[dialect.delimiter]})",
                )
                yield Record(record.line, None, error, record.raw or dialect.delimiter.join(record.value))
                continue
        yield record


# ---- RFC 4180


class BadQuote(Exception):
    """A quoted cell that something follows, or that never ends; the message says which."""


@dataclass
class _Row:
    """One row that grows line by line until its quotes are closed."""

    delimiter: str
    cells: list[str] = field(default_factory=list)
    opened: list[str] | None = None  # the lines so far of the cell that is open

    def feed(self, text: str) -> bool:
        """One more line; whether the row is whole now."""
        at = 0
        while True:
            if self.opened is None and text.startswith('"', at):
                self.opened, at = [], at + 1
            if self.opened is None:
                end = text.find(self.delimiter, at)
                end = len(text) if end < 0 else end
                self.cells.append(text[at:end])
            else:
                end = _closing_quote(text, at)
                self.opened.append(text[at:] if end < 0 else text[at:end])
                if end < 0:
                    return False
                self.cells.append("\n".join(self.opened).replace('""', '"'))
                self.opened, end = None, end + 1
                if end < len(text) and text[end] != self.delimiter:
                    around = text[max(0, end - EXCERPT // 2) : end + EXCERPT // 2]
                    raise BadQuote(f"a quoted cell goes on after its closing quote, near {around!r}")
            if end >= len(text):
                return True
            at = end + 1


def _closing_quote(text: str, at: int) -> int:
    """Where the quote stands that closes a cell; -1 without one. A doubled quote is a character."""
    while (end := text.find('"', at)) >= 0 and text.startswith('"', end + 1):
        at = end + 2
    return end


def _quoted_rows(lines: Iterator[Line], delimiter: str, path: Path) -> Iterator[Record]:
    ahead: deque[Line] = deque()  # lines that a broken quote had swallowed: each is read anew
    while (head := ahead.popleft() if ahead else next(lines, None)) is not None:
        if head.error is not None:
            yield Record(head.number, None, head.error, head.text)
            continue
        if not head.text.strip():
            continue
        row, used, size = _Row(delimiter), [head], 0
        try:
            whole = row.feed(head.text)
            while not whole:
                line = ahead.popleft() if ahead else next(lines, None)
                if line is None or line.error is not None or (size := size + len(line.text)) > MAX_ROW:
                    used += [line] if line is not None else []
                    raise BadQuote("a cell begins with a quote that is never closed")
                used.append(line)
                whole = row.feed(line.text)
            yield Record(head.number, row.cells, raw="\n".join(line.text for line in used) if len(used) > 1 else "")
        except BadQuote as bad:
            ahead.extendleft(reversed(used[1:]))
            fix = "close the quote, double the quotes inside of quoted cells, or save the file as TSV without quotes"
            yield Record(head.number, None, DataError(str(bad), file=path, line=head.number, fix=fix), head.text)


# ---- which dialect


def _is_quoted(cell: str) -> bool:
    """Whether the cell is one string in quotes, with every quote inside of it doubled."""
    return len(cell) > 1 and cell[0] == '"' and _closing_quote(cell, 1) == len(cell) - 1


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _is_quoted(cell) else cell


def _tab_dialect(path: Path) -> Dialect:
    """TSV is not quoted unless the whole file is written so.

    Every line has the same number of cells: each line is a row. Quotes are taken off then if no cell begins with a
    quote without being wholly quoted, and each quoted cell either holds doubled quotes or stands in a column that is
    quoted throughout (the first line, which may be a header, left out). Otherwise the file has quoted line ends or
    tabs if RFC 4180 gives rows of one width.
    """
    width, same_width, improper = 0, True, False
    plain: set[int] = set()  # columns with a cell that is not quoted
    quoted: dict[int, bool] = {}  # column with quoted cells: whether all of these need their quotes
    for line in _lines(path):
        if line.error is not None or not line.text.strip():
            continue
        cells = line.text.split("\t")
        same_width = same_width and len(cells) == (width or len(cells))
        if width:
            for column, cell in enumerate(cells):
                if _is_quoted(cell):
                    quoted[column] = quoted.get(column, True) and '""' in cell[1:-1]
                else:
                    plain.add(column)
                    improper = improper or cell.startswith('"')
        width = len(cells)
    needed = all(all_need or column not in plain for column, all_need in quoted.items())
    if same_width:
        return Dialect("\t", "cells" if quoted and not improper and needed else "none")
    rows = Dialect("\t", "rows")
    return rows if _all_equally_wide(_rows(_lines(path), rows, path)) else Dialect("\t", "none")


def _all_equally_wide(records: Iterable[Record]) -> bool:
    widths = set()
    for record in records:
        widths.add(0 if record.error else len(record.value))
        if len(widths) > 1:
            return False
    return widths != {0}


def _csv_dialect(path: Path) -> Dialect:
    """The first delimiter that gives the file's beginning rows of one width, two cells at least; else a comma."""
    first = next(read_chunks(path), b"")
    lines = first.decode("utf-8", "replace").split("\n")
    if len(first) >= CHUNK_BYTES:
        lines.pop()  # cut in the middle
    for delimiter in CSV_DELIMITERS:
        widths = {len(cells) for cells in _beginning(lines[:SNIFFED_LINES], delimiter)}
        if len(widths) == 1 and widths != {1}:
            return Dialect(delimiter, "rows")
    return Dialect(",", "rows")


def _beginning(lines: list[str], delimiter: str) -> Iterator[list[str]]:
    numbered = (Line(number, text.removesuffix("\r")) for number, text in enumerate(lines, 1))
    for record in _quoted_rows(numbered, delimiter, Path()):
        if record.error is not None:
            return  # perhaps a cell that ends behind this beginning
        yield record.value
