"""Which columns of a table are read: by names, by numbers, by what stands in them, and as the run's first table has
them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.data.columns import LabelKeys, RunColumns
from alpaca_lora.data.formats import BadRow
from alpaca_lora.data.labelled import read_labelled
from alpaca_lora.errors import DataError

RATINGS = [("a fine film", "5"), ("a bad film", "1"), ("so so", "3"), ("fine", "5")]


def read(
    folder: Path, content: str, name: str = "rows.csv", run_columns: RunColumns | None = None, /, **keys: str
) -> tuple[list[tuple[str, str]], str]:
    """((text, label) of all rows, the note)."""
    path = folder / name
    path.write_text(content, encoding="utf-8")
    notes: list[str] = []
    found = []
    for row in read_labelled(path, LabelKeys(**keys), on_note=notes.append, run_columns=run_columns):
        assert not isinstance(row, BadRow), row
        found.append((row.messages[0].content, row.messages[1].content))
    (note,) = notes
    return found, note


def lines(rows: list[tuple[str, str]], *header: str) -> str:
    return "".join(f"{first},{second}\n" for first, second in [*([header] if header else []), *rows])


@pytest.mark.parametrize(
    ("rows", "header"),
    [
        (RATINGS, ("phrase", "stars")),  # a word over numbers
        ([(f"text {i}", "good" if i % 2 else "bad") for i in range(8)], ("phrase", "stars")),  # alone of its kind
        ([("a", "1.5"), ("b", "2")], ("phrase", "stars")),
    ],
)  # fmt: skip
def test_a_header_of_unknown_names_is_refused_and_names_the_keys(
    tmp_path: Path, rows: list[tuple[str, str]], header: tuple[str, str]
) -> None:
    text = lines(rows, *header)
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    assert "rows.csv:1: the first row, 'phrase' and 'stars', looks like a header" in said
    assert "text_key 'phrase', label_key 'stars'" in said and "text_key 1, label_key 2" in said
    # both ways out work
    named, _ = read(tmp_path, text, text="phrase", label="stars")
    assert named == rows
    numbered, note = read(tmp_path, text, text="1", label="2")
    assert numbered[0] == header and len(numbered) == len(rows) + 1
    assert "the first row is a row, and the only one labelled 'stars'" in note


@pytest.mark.parametrize(
    "rows",
    [
        [("a", "good"), ("b", "bad"), ("c", "bad")],  # too few to say
        [("a", "good"), *((f"t{i}", "bad" if i % 2 else "good") for i in range(9))],
        [("a", "rare"), ("b", "alone too"), *((f"t{i}", "bad" if i % 2 else "good") for i in range(9))],
        [("a", "7"), *((f"t{i}", str(i % 3)) for i in range(2))],  # a number over numbers
        [("a", "TRUE"), *((f"t{i}", "true") for i in range(9)), ("x", "false"), ("y", "false")],
        [("only", "one")],
    ],
)
def test_a_first_row_that_may_be_a_row_is_one(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    found, note = read(tmp_path, lines(rows))
    assert (
        len(found) == len(rows) and found[0][0] == rows[0][0] and note.startswith("no header; the text is in column 1")
    )


def test_the_first_table_decides_for_the_others(tmp_path: Path) -> None:
    run_columns = RunColumns()
    read(tmp_path, "pos,a good one\nneg,a bad one\npos,fine\n", "first.csv", run_columns)
    assert run_columns.first == (2, 1, 0)
    lopsided = "pos,same\nneg,same\n"  # by itself: fewer values on the right
    assert read(tmp_path, lopsided)[0] == [("pos", "same"), ("neg", "same")]
    assert read(tmp_path, lopsided, "second.csv", run_columns)[0] == [("same", "pos"), ("same", "neg")]
    # a header of its own and another number of columns decide by themselves
    assert read(tmp_path, "text,label\npos,same\n", "third.csv", run_columns)[0] == [("pos", "same")]
    with pytest.raises(DataError, match="no column is known to hold the text"):
        read(tmp_path, "1,pos,same\n2,neg,same\n", "fourth.csv", run_columns)
    with pytest.raises(DataError, match=r"fifth.csv:1: the first row, 'phrase' and 'stars', looks like a header"):
        read(tmp_path, lines([(b, a) for a, b in RATINGS], "stars", "phrase"), "fifth.csv", run_columns)
    assert run_columns.first == (2, 1, 0)


def test_names_of_the_first_table_hold_where_the_others_have_no_header(tmp_path: Path) -> None:
    run_columns, keys = RunColumns(), {"text": "phrase", "label": "stars"}
    read(tmp_path, "id,phrase,stars\n1,a,5\n2,b,4\n", "first.csv", run_columns, **keys)
    found, note = read(tmp_path, "3,c,5\n4,d,4\n", "second.csv", run_columns, **keys)
    assert found == [("c", "5"), ("d", "4")] and note == "no header; the text is in column 2, the label in column 3"
    with pytest.raises(DataError, match="phrase: is missing"):  # alone it says nothing of its columns
        read(tmp_path, "3,c,5\n4,d,4\n", **keys)
