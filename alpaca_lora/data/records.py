"""UTF-8 bytes -> JSON values one at a time, each with the line it begins on. Knows no field names.

Two layouts: JSON lines, where a bad line costs that line only, and one JSON array (or values one after the other),
where the first bad character ends the file. Memory is bounded by ``MAX_ROW`` characters, whatever the file's size.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca_lora.errors import DataError

MAX_ROW = 64 << 20
EXCERPT = 60
# control characters inside strings are let through: cleaning removes and counts them
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value; or, for a bad line, ``error`` and the line's text (``raw``, shortened)."""

    line: int
    value: Any
    error: DataError | None = None
    raw: str = ""


def read_lines(chunks: Iterator[bytes], max_bytes: int = MAX_ROW) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number, byte offset, the line without its newline) of each line; None instead of a line above
    ``max_bytes``.
    """
    number, offset, size = 1, 0, 0
    parts: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            size += len(piece)
            yield number, offset, b"".join([*parts, piece]) if size <= max_bytes else None
            parts.clear()
            number, offset, size = number + 1, offset + size + 1, 0
        size += len(rest)
        if size > max_bytes:
            parts.clear()
        else:
            parts.append(rest)
    if size:
        yield number, offset, b"".join(parts) if size <= max_bytes else None


def read_json_lines(chunks: Iterator[bytes], path: Path, max_bytes: int = MAX_ROW) -> Iterator[Record]:
    """One record per line that is not blank; a bad line is a Record with an error, and reading goes on."""
    for number, offset, data in read_lines(chunks, max_bytes):
        if data is None:
            error = DataError(f"the line is longer than {max_bytes:,} bytes", file=path, line=number, fix="split it")
            yield Record(number, None, error)
            continue
        try:
            text = data.decode("utf-8")
            if not text.strip():
                continue
            yield Record(number, _DECODER.decode(text))
        except UnicodeDecodeError as error:
            yield Record(number, None, not_utf8(error, data, offset, path, number), data.decode("utf-8", "replace"))
        except json.JSONDecodeError as error:
            yield Record(number, None, _bad_json(error, text, error.pos, error.pos + 1, path, number), text)
        except (RecursionError, ValueError) as error:
            yield Record(number, None, _unreadable(error, path, number), text)


def not_utf8(error: UnicodeDecodeError, data: bytes, offset: int, path: Path, line: int) -> DataError:
    """``offset``: of ``data`` in the decoded stream, so that the byte can be found with an editor."""
    byte = data[error.start]
    around = data[max(0, error.start - EXCERPT // 2) : error.start + EXCERPT // 2].decode("latin-1")
    return DataError(
        f"byte {offset + error.start} (0x{byte:02x}) is not UTF-8, near {around!r}",
        file=path,
        line=line,
        expected="UTF-8, or UTF-16 with a byte order mark",
        fix="convert the file (a Latin-1 file: iconv -f latin1 -t utf-8)",
    )


def _bad_json(error: json.JSONDecodeError, text: str, at: int, column: int, path: Path, line: int) -> DataError:
    around = text[max(0, at - EXCERPT // 2) : at + EXCERPT // 2]
    where = (
        f"column {column}, near {around!r}" if at < len(text) else f"column {column}, where it ends after {around!r}"
    )
    return DataError(f"not JSON: {error.msg.removesuffix(' at')} at {where}", file=path, line=line)


def _unreadable(error: Exception, path: Path, line: int) -> DataError:
    what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError(f"not a row: {what}", file=path, line=line)


class _Text:
    """A window on the decoded text: ``buffer[pos:]`` is what is not read yet, ``line`` the line of ``pos``."""

    def __init__(self, chunks: Iterator[bytes], path: Path, max_chars: int) -> None:
        self.buffer, self.pos, self.line, self.at_end = "", 0, 1, False
        self._column_base = 0  # characters of the current line that have left the buffer
        self._chunks, self._path, self._max_chars = chunks, path, max_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = 0

    def fill(self) -> None:
        """Read on, as much again as is waiting, so that a long row costs time in proportion to its length."""
        waiting = len(self.buffer) - self.pos
        if waiting > self._max_chars:
            raise DataError(
                f"the row that begins here is longer than {self._max_chars:,} characters or never closed",
                file=self._path,
                line=self.line,
            )
        parts, size = [self.buffer[self.pos :]], 0
        self._column_base = self._columns_before(self.pos)
        while size <= waiting and not self.at_end:
            chunk = next(self._chunks, None)
            self.at_end = chunk is None
            parts.append(self._decode(chunk or b"", parts))
            size += len(parts[-1])
        self.buffer, self.pos = "".join(parts), 0

    def _decode(self, chunk: bytes, before: list[str]) -> str:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, self.at_end)
        except UnicodeDecodeError as error:
            line = self.line + sum(part.count("\n") for part in before) + error.object[: error.start].count(b"\n")
            raise not_utf8(error, error.object, self._offset - pending, self._path, line) from error
        self._offset += len(chunk)
        return text

    def _columns_before(self, pos: int) -> int:
        newline = self.buffer.rfind("\n", 0, pos)
        return pos - newline - 1 if newline >= 0 else self._column_base + pos

    def column(self, pos: int) -> int:
        return self._columns_before(pos) + 1

    def skip_to(self, pos: int) -> None:
        self.line += self.buffer.count("\n", self.pos, pos)
        self.pos = pos

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.pos)
            self.skip_to(match.end() if match else self.pos)
            if self.pos < len(self.buffer):
                return self.buffer[self.pos]
            if self.at_end:
                return ""
            self.fill()

    def value(self) -> Any:
        """The JSON value at ``pos``, which moves behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.pos)
                if end < len(self.buffer) or self.at_end:
                    self.skip_to(end)
                    return value
            except json.JSONDecodeError as error:
                if self.at_end or self._is_certain(error):
                    line = self.line + self.buffer.count("\n", self.pos, error.pos)
                    column = self.column(error.pos)
                    raise _bad_json(error, self.buffer, error.pos, column, self._path, line) from error
            except (RecursionError, ValueError) as error:
                raise _unreadable(error, self._path, self.line) from error
            self.fill()

    def _is_certain(self, error: json.JSONDecodeError) -> bool:
        """Whether more text cannot heal the error: it is far from the buffer's end and not an open string."""
        return error.pos < len(self.buffer) - 64 and not error.msg.startswith("Unterminated string")


def read_json_values(chunks: Iterator[bytes], path: Path, max_chars: int = MAX_ROW) -> Iterator[Record]:
    """The elements of one JSON array, or JSON values that follow one another. Raises DataError at the first bad one."""
    text = _Text(chunks, path, max_chars)
    is_array = text.peek() == "["
    if is_array:
        text.skip_to(text.pos + 1)
    count = 0
    while True:
        character = text.peek()
        if is_array and character == "]" and count == 0:
            break
        if not character:
            if is_array:
                raise DataError(
                    f"the file ends inside its array, after {count:,} whole rows",
                    file=path,
                    line=text.line,
                    expected="a closing ]",
                    fix="copy the file again",
                )
            return
        line = text.line
        yield Record(line, text.value())
        count += 1
        character = text.peek()
        if not is_array:
            continue
        if character == "]":
            break
        if character == ",":
            text.skip_to(text.pos + 1)
        elif character:
            raise DataError(
                f"{character!r} at column {text.column(text.pos)} after row {count:,} of the array",
                file=path,
                line=text.line,
                expected="a comma or ]",
            )
    text.skip_to(text.pos + 1)
    if character := text.peek():
        raise DataError(
            f"{character!r} follows the array's end", file=path, line=text.line, expected="one array per file"
        )
