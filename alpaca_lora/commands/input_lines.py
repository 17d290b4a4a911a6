"""Lines of standard input as they come: UTF-8, together where several are waiting. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from alpaca_lora.data.records import not_utf8
from alpaca_lora.errors import DataError

NAME = "standard input"
CHUNK_BYTES = 1 << 14  # one answer is waited for by a program that writes a line; a file comes in pieces of this size


def waiting_lines(stream: TextIO) -> Iterator[list[str]]:
    """The lines that are there, without their ends, again and again until the stream ends.

    DataError with the number of a line that is not UTF-8, once those before it have been handed out.
    """
    number, offset = 1, 0
    for lines in _byte_lines(stream):
        good, error = _decoded(lines, number, offset)
        if good:
            yield good
        if error is not None:
            raise error
        number += len(lines)
        offset += sum(len(line) + 1 for line in lines)


def _byte_lines(stream: TextIO) -> Iterator[list[bytes]]:
    parts: list[bytes] = []
    for chunk in _chunks(stream):
        parts.append(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(parts).split(b"\n")
            parts = [rest]
            yield lines
    if last := b"".join(parts):
        yield [last]


def _chunks(stream: TextIO) -> Iterator[bytes]:
    """What can be read without waiting for more; the bytes, because the locale decides what text they would be."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # text from another program part, which is Unicode already
        yield stream.read().encode("utf-8", "surrogatepass")
        return
    while chunk := buffer.read1(CHUNK_BYTES):
        yield chunk


def _decoded(lines: Sequence[bytes], number: int, offset: int) -> tuple[list[str], DataError | None]:
    """(the lines up to the first that is not UTF-8, what is wrong with that one)."""
    good: list[str] = []
    for line in lines:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return good, not_utf8(error, line, offset, Path(NAME), number + len(good))
        text = text.removeprefix("\ufeff") if number + len(good) == 1 else text
        good.append(text.removesuffix("\r"))
        offset += len(line) + 1
    return good, None
