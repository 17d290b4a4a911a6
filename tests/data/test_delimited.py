"""Tables: the right number of rows whatever the quoting, or an error that names the line."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.data.delimited import read_table
from alpaca_lora.data.records import Record


def table(folder: Path, text: str | bytes, name: str = "rows.tsv") -> tuple[str, list[Record]]:
    """(quoting, rows) of a file with this content."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dialect, records = read_table(path)
    return dialect.quoting, list(records)


def cells(records: list[Record]) -> list[list[str]]:
    return [record.value for record in records]


def test_a_plain_table_is_lines_and_tabs(tmp_path: Path) -> None:
    quoting, records = table(tmp_path, "good , fun\t1\n\nbad\t0\r\n")
    assert quoting == "none" and cells(records) == [["good , fun", "1"], ["bad", "0"]]
    assert [record.line for record in records] == [1, 3]


# as in MRPC, whose quotes open and close wherever a sentence was cut
UNBALANCED = [
    ('"I love it', "1"), ("fine", "1"), ('" he said , and left', "0"), ('it is 5" long', "0"), ("so so", "0"),
    ('"a whole quote"', "1"), ('the "end', "1"), ('" "', "0"),
]  # fmt: skip


def test_unbalanced_quotes_lose_no_row(tmp_path: Path) -> None:
    text = "".join(f"{a}\t{b}\n" for a, b in UNBALANCED)
    assert len(list(csv.reader(io.StringIO(text), delimiter="\t"))) < len(UNBALANCED)  # what must not happen
    quoting, records = table(tmp_path, text)
    assert quoting == "none" and cells(records) == [list(row) for row in UNBALANCED]


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC])
def test_quoting_throughout_is_taken_off(tmp_path: Path, quoting: int) -> None:
    rows = [("text", "label"), ('he said "go"', 1), ("", 0), ('"', 1), ("plain" if quoting else 'not "plain"', 0)]
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(rows)
    found, records = table(tmp_path, buffer.getvalue())
    assert found == "cells" and cells(records) == [[str(value) for value in row] for row in rows]


def test_a_single_quoted_sentence_is_no_quoting(tmp_path: Path) -> None:
    quoting, records = table(tmp_path, '"yes" , i see\t1\nno\t0\n"maybe"\t1\n')
    assert quoting == "none" and records[2].value[0] == '"maybe"'


def test_a_quoted_header_alone_decides_nothing(tmp_path: Path) -> None:
    assert table(tmp_path, '"text"\t"label"\na\t1\n')[0] == "none"
    assert table(tmp_path, 'text\tlabel\n"a"\t1\n"b"\t0\n')[0] == "cells"


def test_tabs_and_line_ends_in_quotes_are_read(tmp_path: Path) -> None:
    quoting, records = table(tmp_path, 'a\t1\n"two\nlines, a\ttab"\t0\nb\t1\n')
    assert quoting == "rows" and cells(records)[1] == ["two\nlines, a\ttab", "0"]
    assert [(record.line, record.raw != "") for record in records] == [(1, False), (2, True), (4, False)]


def test_a_row_of_another_width_is_an_error_of_its_own(tmp_path: Path) -> None:
    quoting, records = table(tmp_path, 'a\t1\n"b\n"c\t1\tx\nd\t0\n')
    assert quoting == "none" and [record.error is None for record in records] == [True, False, False, True]
    assert "rows.tsv:2: has 1 columns, expected 2, as in the first row (divided by a tab)" in str(records[1].error)
    assert records[2].raw == '"c\t1\tx'


def test_a_csv_keeps_to_rfc_4180(tmp_path: Path) -> None:
    text = 'text,label\n"a, b",1\n"say ""hi""\r\nthere",0\n5" pipe,1\n,\n'
    _, records = table(tmp_path, text, "rows.csv")
    assert cells(records) == [
        ["text", "label"], ["a, b", "1"], ['say "hi"\nthere', "0"], ['5" pipe', "1"], ["", ""]
    ]  # fmt: skip
    assert [record.line for record in records] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs"), (",", "commas")])
def test_a_csv_is_divided_by_what_gives_rows_of_one_width(tmp_path: Path, delimiter: str, name: str) -> None:
    rows = [["text", "label"], ["one", "1"], ["so, it; is" if delimiter == "\t" else "so", "0"]]
    _, records = table(tmp_path, "\n".join(delimiter.join(row) for row in rows), f"{name}.csv")
    assert cells(records) == rows


def test_a_broken_quote_costs_its_own_line(tmp_path: Path) -> None:
    text = 'a,1\n"b" c,1\nd,0\n"never closed,1\ne,0\nf,1\n'
    _, records = table(tmp_path, text, "rows.csv")
    assert [record.line for record in records if record.error is None] == [1, 3, 5, 6]
    wrong = [str(record.error) for record in records if record.error]
    assert "rows.csv:2: a quoted cell goes on after its closing quote, near '\"b\" c,1'" in wrong[0]
    assert "rows.csv:4: a cell begins with a quote that is never closed" in wrong[1] and records[3].raw


def test_what_is_no_text_costs_its_own_line(tmp_path: Path) -> None:
    _, records = table(tmp_path, b"a\t1\ncaf\xe9\t0\nb\t1\n")
    assert [record.error is None for record in records] == [True, False, True]
    assert "rows.tsv:2: byte 7 (0xe9) is not UTF-8" in str(records[1].error)
    _, records = table(tmp_path, b'a,1\n"x\ncaf\xe9",0\nb,1\n', "rows.csv")
    assert [record.line for record in records if record.error is None] == [1, 4]


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffa\t1\r\n你\t0\r\n".encode(), "a\t1\n你\t0\n".encode("utf-16"), "a\t1\n你\t0\n".encode("utf-8-sig"),
        "a\t1\n你\t0\n".encode("utf-16-le"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_marks_line_ends_and_compression(tmp_path: Path, data: bytes, packed: bool) -> None:
    name = "rows.tsv.gz" if packed else "rows.tsv"
    _, records = table(tmp_path, gzip.compress(data) if packed else data, name)
    assert cells(records) == [["a", "1"], ["你", "0"]]


text = st.text(st.sampled_from("ab \"',;\t\n"), max_size=8)


@given(st.lists(st.tuples(text, st.sampled_from("01")), min_size=1, max_size=12), st.sampled_from([0, 1, 2]))
def test_a_csv_of_any_content_comes_back(rows: list[tuple[str, str]], quoting: int) -> None:
    with_plain = [("plain", "0"), *rows]
    buffer = io.StringIO()
    csv.writer(buffer, quoting=quoting, lineterminator="\n").writerows(with_plain)
    assert _parsed(buffer.getvalue(), "rows.csv") == [list(row) for row in with_plain]


@given(st.lists(st.tuples(st.text(st.sampled_from('ab "'), max_size=6), st.sampled_from("01")), max_size=12))
def test_a_tsv_without_quoting_keeps_every_row(rows: list[tuple[str, str]]) -> None:
    """Whatever quotes stand in it; and the texts too, unless they look quoted throughout."""
    with_plain = [("plain", "0"), ('open" and "close', "1"), *rows]
    found = _parsed("".join(f"{a}\t{b}\n" for a, b in with_plain), "rows.tsv")
    assert len(found) == len(with_plain) and [row[1] for row in found] == [row[1] for row in with_plain]
    if not any('""' in a for a, _ in rows):
        assert [row[0] for row in found] == [row[0] for row in with_plain]


def _parsed(content: str, name: str) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        records = table(Path(folder), content, name)[1]
    assert all(record.error is None for record in records)
    return cells(records)
