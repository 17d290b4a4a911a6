"""Labelled texts: which columns are read, which rows are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alpaca_lora.data.columns import LabelKeys
from alpaca_lora.data.formats import BadRow
from alpaca_lora.data.labelled import read_labelled
from alpaca_lora.errors import DataError


def read(
    folder: Path, content: str, name: str = "rows.tsv", /, **keys: str
) -> tuple[list[tuple[str, str, int]], list[str], list[str]]:
    """((text, label, line) of the good rows, errors of the bad ones, notes)."""
    path = folder / name
    path.write_text(content, encoding="utf-8")
    notes: list[str] = []
    good, bad = [], []
    for row in read_labelled(path, LabelKeys(**keys), on_note=notes.append):
        if isinstance(row, BadRow):
            bad.append(str(row.error))
        else:
            assert row.kind == "labelled" and row.file == str(path)
            good.append((row.messages[0].content, row.messages[1].content, row.line))
    return good, bad, notes


def test_two_columns_without_a_header(tmp_path: Path) -> None:
    good, bad, notes = read(tmp_path, "a fine film\t1\na bad film\t0\nfine\t1\n")
    assert good == [("a fine film", "1", 1), ("a bad film", "0", 2), ("fine", "1", 3)] and not bad
    assert notes == ["no header; the text is in column 1, the label in column 2"]


def test_the_label_may_come_first(tmp_path: Path) -> None:
    good, _, notes = read(tmp_path, "pos\tgood , this\nneg\tbad\npos\tfine\n")
    assert good[0] == ("good , this", "pos", 1)
    assert notes == ["no header; the text is in column 2, the label in column 1"]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("sentence\tlabel", "the text is in 'sentence', the label in 'label'"),
        ("Text\tLABEL", "the text is in 'Text', the label in 'LABEL'"),
        ('"text"\t"label"', "the text is in 'text', the label in 'label'"),
        ("question\tintent", "the text is in 'question', the label in 'intent'"),
        ("review\tstars", "the text is in 'review', the label in 'stars'"),
    ],
)
def test_a_header_is_known_by_its_names(tmp_path: Path, header: str, told: str) -> None:
    good, _, notes = read(tmp_path, f"{header}\na\t1\nb\t0\n")
    assert [row[:2] for row in good] == [("a", "1"), ("b", "0")] and notes == [told]


def test_a_label_that_is_spelled_like_a_header_is_a_label(tmp_path: Path) -> None:
    good, _, notes = read(tmp_path, "send it back\treview\nbuy it\torder\nnot good\treview\n")
    assert len(good) == 3 and notes[0].startswith("no header")


def test_more_columns_need_names_or_numbers(tmp_path: Path) -> None:
    text = "id\tsentence\tlabel\tsource\n7\ta\t1\tx\n8\tb\t0\ty\n"
    good, _, notes = read(tmp_path, text)
    assert good == [("a", "1", 2), ("b", "0", 3)]
    assert notes == ["the text is in 'sentence', the label in 'label'; 'id', 'source' not read"]
    good, _, _ = read(tmp_path, text, label="source")
    assert good[0] == ("a", "x", 2)
    good, _, notes = read(tmp_path, "x1\t1\t\ta\nx2\t0\t*\tb\n", text="4", label="2")
    assert good == [("a", "1", 1), ("b", "0", 2)]
    assert notes == ["no header; the text is in column 4, the label in column 2"]
    good, _, _ = read(tmp_path, text, text="2", label="3")  # the first line is still a header
    assert [row[0] for row in good] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("x1\t1\ta\nx2\t0\tb\n", {}, r"rows.tsv:1: no column is known to hold the text: 'x1', '1', 'a', .*text_key"),
        ("sentence\tscore\tid\na\t1\t2\n", {}, r"no column is known to hold the label: .*label_key"),
        ("index\tsentence\n0\ta\n1\tb\n", {}, r"no column is known to hold the label: 'index', 'sentence'"),
        ("body\tlabel\na\t1\n", {"text": "bodi"}, r"rows.tsv:1: bodi: is missing, .* did you mean 'body'\?"),
        ("text\tlabel\na\t1\n", {"label": "9"}, r"9: is missing, expected the column that label_key names"),
        ("text\ta\tb\ntext\tc\td\n", {}, r"no column is known to hold the text"),
        ("a\tsentence\nb\tc\n", {"text": "sentence", "label": "2"}, r"text and label are both in column 2"),
        ("alone\nb\n", {}, r"rows.tsv:1: the row has one column, expected text and label, with a tab between them"),
        ("text\tlabel\n", {}, r"rows.tsv: the file holds no rows, expected at least one below the header"),
        ("", {}, r"rows.tsv: the file holds no rows"),
    ],
)
def test_what_is_not_known_is_asked_for(tmp_path: Path, text: str, keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, **keys)


def test_bad_rows_say_where_they_are(tmp_path: Path) -> None:
    good, bad, _ = read(tmp_path, f"text\tlabel\na\t1\n \t0\nb\t\nc\nd\t0\t1\ne\t{'x' * 201}\nf\t0\n")
    assert [row[0] for row in good] == ["a", "f"]
    where = [error.split("rows.tsv:")[1] for error in bad]
    assert where[0].startswith("3: text: is empty, expected a text to classify")
    assert where[1].startswith("4: label: is empty, expected a word or a number")
    assert where[2].startswith("5: has 1 columns, expected 2") and where[3].startswith("6: has 3 columns")
    assert where[4].startswith("7: label: has 201 characters")


def test_json_rows_of_words_numbers_and_truth_values(tmp_path: Path) -> None:
    labels = [1, "1", True, 1.0, "1.0", "TRUE", "True", "1.", 1.5, "-2.00", "v1.0", "01", 1e300]
    rows = [{"text": "a", "label": label, **({"id": 4} if label == 1.5 else {})} for label in labels]
    good, _, notes = read(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl")
    expected = ["1", "1", "true", "1", "1", "true", "true", "1", "1.5", "-2", "v1.0", "01", "1e+300"]
    assert [row[1] for row in good] == expected and [row[2] for row in good] == [*range(1, 14)]
    assert notes == ["the text is in 'text', the label in 'label'; 'id' not read"]
    rows = [{"body": "a", "kind": "x"}]
    good, _, _ = read(tmp_path, json.dumps(rows), "rows.json", text="body", label="kind")
    assert good == [("a", "x", 1)]


def test_json_rows_that_are_no_labelled_texts(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 0}, {"text": "b"}, {"text": "c", "label": None}, {"text": "d", "label": [1, 2]},
        {"text": 5, "label": 0}, {"text": "", "label": 0}, 7, {"text": "e", "label": float("nan")},
    ]  # fmt: skip
    good, bad, _ = read(tmp_path, "".join(json.dumps(row) + "\n" for row in rows) + "{\n", "rows.jsonl")
    assert [row[0] for row in good] == ["a"]
    expected = [
        ":2: label: is missing", ":3: label: is null", ":4: label: is a list", ":5: text: is a number",
        ":6: text: is empty", ":7: the row is a number", ":8: label: is NaN", ":9: not JSON",
    ]  # fmt: skip
    assert len(bad) == len(expected)
    assert all(what in error for what, error in zip(expected, bad, strict=True))


def test_fields_that_are_not_known_name_the_keys(tmp_path: Path) -> None:
    _, bad, _ = read(tmp_path, json.dumps({"body": "a", "kind": 1}), "rows.jsonl")
    assert "no column is known to hold the text: 'body', 'kind'" in bad[0] and "text_key" in bad[0]
    with pytest.raises(DataError, match=r"the format is not known, it begins 'plain', expected \.tsv, \.tab, \.csv"):
        read(tmp_path, "plain", "rows.dat")
    with pytest.raises(DataError, match=r"rows.jsonl: the file is empty"):
        read(tmp_path, "", "rows.jsonl")


def test_rows_that_a_quote_has_joined_are_an_error(tmp_path: Path) -> None:
    text = 'good,1\n"bad,0\nfine,1\nan end",0\nso,0\n'
    with pytest.raises(DataError, match=r"rows.csv:2: a quote that opens here makes one row of several lines"):
        read(tmp_path, text, "rows.csv")
    # a text of two lines is no such thing, though a line of it has a comma
    good, bad, _ = read(tmp_path, 'good,1\n"bad, really\nfine",0\nso,0\n', "rows.csv")
    assert len(good) == 3 and good[1][0] == "bad, really\nfine" and not bad
    # in a table by tabs each line is a row to begin with
    good, _, _ = read(tmp_path, text.replace(",", "\t"))
    assert len(good) == 5 and good[1][0] == '"bad'
