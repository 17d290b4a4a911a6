"""Lines of a pipe: as they come, each once, whatever the locale says they are."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable

import pytest

from alpaca_lora.commands.input_lines import CHUNK_BYTES, waiting_lines
from alpaca_lora.errors import DataError


def pipe(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="ascii")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\r\n\n two\t\n", ["one", "", " two\t"]),
        (b"\n", [""]),
        (b"a\rb\x0bc\n", ["a\rb\x0bc"]),  # one line to those who wrote it
        ("\ufeffé\n\ufeff店\n".encode(), ["é", "\ufeff店"]),
    ],
)
@pytest.mark.parametrize("stream", [pipe, lambda data: io.StringIO(data.decode(), newline="")])
def test_every_line_comes_once(data: bytes, lines: list[str], stream: Callable[[bytes], io.TextIOBase]) -> None:
    assert [line for some in waiting_lines(stream(data)) for line in some] == lines  # pyright: ignore


def test_a_long_line_and_many_lines_cross_the_borders_of_what_is_read() -> None:
    lines = ["é" * CHUNK_BYTES, *(f"line {i}" for i in range(5000))]
    groups = list(waiting_lines(pipe("\n".join(lines).encode())))
    assert [line for group in groups for line in group] == lines and 1 < len(groups) < 20


def test_what_is_there_is_handed_out_before_more_is_waited_for() -> None:
    """A program that writes one line and waits for its answer gets it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as stream, os.fdopen(writing, "wb", buffering=0) as out:
        waiting = waiting_lines(stream)
        for text in (b"one\ntwo\n", b"three\n"):
            out.write(text)
            found: list[list[str]] = []
            reader = threading.Thread(target=lambda found=found: found.append(next(waiting)), daemon=True)
            reader.start()
            reader.join(timeout=10)
            assert found == [text.decode().split()]


def test_what_is_not_utf8_is_named_after_the_lines_before_it() -> None:
    waiting = waiting_lines(pipe(b"one\n\xe9t\xe9\nthree\n"))
    assert next(waiting) == ["one"]
    with pytest.raises(DataError, match=r"standard input:2: byte 4 \(0xe9\) is not UTF-8") as caught:
        next(waiting)
    assert caught.value.exit_code == 3
