"""Bytes -> JSON values with their lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.data.records import read_json_lines, read_json_values, read_lines
from alpaca_lora.errors import DataError

FILE = Path("rows.json")
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@given(st.lists(JSON_VALUES, min_size=1, max_size=6), st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_arrays_are_read_whole_however_they_are_cut(
    rows: list, size: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert [record.value for record in read_json_values(cut(data, size), FILE)] == rows


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), min_size=1, max_size=6), st.integers(1, 40)
)
def test_lines_are_read_whole_however_they_are_cut(rows: list, size: int) -> None:
    data = "\r\n".join(json.dumps(row) for row in rows).encode()
    records = list(read_json_lines(cut(data, size), FILE))
    assert [record.value for record in records] == rows
    assert [record.line for record in records] == list(range(1, len(rows) + 1))


def test_a_row_of_an_array_has_the_line_it_begins_on() -> None:
    data = b'[\n  {"a": 1},\n\n  {\n    "a": "x\\ny"\n  }, {"a": 3}\n]\n'
    assert [(r.line, r.value["a"]) for r in read_json_values(cut(data, 5), FILE)] == [(2, 1), (4, "x\ny"), (6, 3)]


def test_values_that_follow_one_another_are_rows() -> None:
    data = b'{\n "a": 1\n}\n{\n "a": 2\n}\n'
    assert [(r.line, r.value["a"]) for r in read_json_values(cut(data, 7), FILE)] == [(1, 1), (4, 2)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1}, {"a": 2', r"rows.json:1: not JSON: Expecting ',' delimiter at column 19, where it ends after "),
        (b'[\n{"a": 1},\n{"a" 2}\n]', r"rows.json:3: not JSON: Expecting ':' delimiter at column 6, near"),
        (b'[\n{"a": 1},', r"rows.json:2: the file ends inside its array, after 1 whole rows, expected a closing \]"),
        (b'[{"a": 1} {"a": 2}]', r"'\{' at column 11 after row 1 of the array, expected a comma or \]"),
        (b'[{"a": 1}]\n[{"a": 2}]', r"rows.json:2: '\[' follows the array's end"),
        (b'[{"a": 1},]', r"not JSON: Expecting value at column 11"),
        (b'[{"a": "caf\xe9"}]', r"rows.json:1: byte 11 \(0xe9\) is not UTF-8, near .*iconv -f latin1"),
        (b"[" * 100_000, r"nested too deeply"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", r"not a row: Exceeds the limit"),
    ],
)
def test_a_broken_array_is_one_message_with_line_and_column(data: bytes, message: str) -> None:
    for size in (3, 1000, 1 << 20):
        with pytest.raises(DataError, match=message):
            list(read_json_values(cut(data, size), FILE))


def test_the_byte_of_latin1_is_counted_from_the_files_begin() -> None:
    data = b'[{"a": "x"},\n' + b'{"a": "y"},\n' * 50 + b'{"a": "\xe9"}]'
    with pytest.raises(DataError, match=rf"rows.json:52: byte {data.index(0xE9)} \(0xe9\)"):
        list(read_json_values(cut(data, 64), FILE))


def test_a_bad_line_costs_that_line_only() -> None:
    data = b'{"a": 1}\n\n{"a": tru}\n{"a": "\xe9"}\n{"a": 2}'
    records = list(read_json_lines(cut(data, 4), FILE))
    assert [record.line for record in records] == [1, 3, 4, 5]
    assert [record.error is None for record in records] == [True, False, False, True]
    assert str(records[1].error).startswith("rows.json:3: not JSON: Expecting value at column 7, near '{\"a\": tru}'")
    assert f"byte {data.index(0xE9)} (0xe9) is not UTF-8" in str(records[2].error)
    assert records[1].raw == '{"a": tru}'


def test_only_newlines_end_a_line() -> None:
    data = '{"a": "one\u2028two\x85three"}\n{"a": 2}'.encode()
    assert [record.line for record in read_json_lines(cut(data, 9), FILE)] == [1, 2]


def test_control_characters_inside_strings_are_let_through_to_cleaning() -> None:
    (record,) = read_json_lines(iter([b'{"a": "x\x00\ty"}']), FILE)
    assert record.value == {"a": "x\x00\ty"}


def endless_line(size: int) -> Iterator[bytes]:
    yield b'{"a": "'
    for _ in range(size >> 20):
        yield b"x" * (1 << 20)
    yield b'"}\n{"a": 2}\n'


def test_a_line_beyond_the_limit_is_bad_and_takes_no_memory() -> None:
    kept = list(read_lines(endless_line(1 << 30), max_bytes=4 << 20))
    assert [(number, data is None) for number, _, data in kept] == [(1, True), (2, False)]
    records = list(read_json_lines(endless_line(1 << 27), FILE, max_bytes=1 << 20))
    assert "rows.json:1: the line is longer than 1,048,576 bytes" in str(records[0].error)
    assert records[1].value == {"a": 2}


def test_a_row_of_an_array_beyond_the_limit_stops_the_reading() -> None:
    drawn = 0

    def chunks() -> Iterator[bytes]:
        nonlocal drawn
        yield b"["
        for chunk in endless_line(1 << 30):
            drawn += len(chunk)
            yield chunk

    with pytest.raises(DataError, match=r"rows.json:1: the row that begins here is longer than 4,194,304 characters"):
        list(read_json_values(chunks(), FILE, max_chars=4 << 20))
    assert drawn < 20 << 20
