"""A file -> conversations, for each format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from alpaca_lora.data.formats import BadRow, Keys, read_conversations, read_rows
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation, Message, instruction

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith("l"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def turns(rows: list[Conversation]) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in row.messages] for row in rows]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows", "rows.data"])
def test_alpaca_as_array_and_as_lines(tmp_path: Path, name: str) -> None:
    content = [ALPACA, {"instruction": "Hi", "output": "Ho"}, {"instruction": "A", "input": None, "output": "B"}]
    path = write(tmp_path, name, content if name != "rows.data" else "\n".join(map(json.dumps, content)))
    first_lines = [1, 2, 3] if name in ("rows.jsonl", "rows.data") else [1, 1, 1]
    assert list(read_conversations(path)) == [
        instruction("Add.", "1 2", "3", file=str(path), line=first_lines[0]),
        instruction("Hi", "", "Ho", file=str(path), line=first_lines[1]),
        instruction("A", "", "B", file=str(path), line=first_lines[2]),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "r"},
        {"prompt": "p", "response": "r"},
        {"question": "p", "answer": "r"},
        {"instruction": "p", "response": "r"},
        {"query": "p", "response": "r"},
    ],
)
def test_prompt_and_completion_under_their_usual_names(tmp_path: Path, row: dict) -> None:
    (one,) = read_conversations(write(tmp_path, "rows.jsonl", [row]))
    assert one.kind == "instruction" and turns([one]) == [[("user", "p"), ("assistant", "r")]]


def test_openai_messages(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "here?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "4 °C"},
            {"role": "assistant", "content": "Rain."},
        ]
    }
    (one,) = read_conversations(write(tmp_path, "rows.jsonl", [row]))
    assert one.kind == "chat"
    assert turns([one]) == [
        [
            ("system", "Be brief."), ("user", "Weather here?"), ("assistant", '[{"function": {"name": "weather"}}]'),
            ("tool", "rain"), ("tool", "4 °C"), ("assistant", "Rain."),
        ]
    ]  # fmt: skip


def test_sharegpt_roles_and_the_system_beside_them(tmp_path: Path) -> None:
    row = {
        "system": "Use tools.",
        "conversations": [
            {"from": "human", "value": "h"},
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "o"},
            {"from": "gpt", "value": "g"},
        ],
    }
    (one,) = read_conversations(write(tmp_path, "rows.json", [row]))
    roles = [("system", "Use tools."), ("user", "h"), ("assistant", "{}"), ("tool", "o"), ("assistant", "g")]
    assert turns([one]) == [roles]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([("human", "h"), ("gtp", "g")], r"conversations\[1\].from: the role 'gtp' is not known.*did you mean 'gpt'"),
        ([("human", "h"), ("gpt", " ")], r"conversations\[1\]: the assistant says nothing"),
        ([("human", "h"), ("human", "h")], r"conversations\[1\]: a user turn follows a user turn, expected assistant"),
        (
            [("human", "h"), ("gpt", "a"), ("gpt", "b")],
            r"conversations\[2\]: an assistant turn follows an assistant turn",
        ),
        ([("human", "h"), ("gpt", "a"), ("system", "s")], r"conversations\[2\]: a system turn comes late"),
        ([("gpt", "a")], r"conversations\[0\]: the first turn is an assistant's"),
        ([("human", "h")], r"conversations: no turn is the assistant's"),
        ([], r"conversations: is an empty list"),
        ([("human", None), ("gpt", "g")], r"conversations\[0\].value: is null, expected text"),
    ],
)
def test_turns_that_make_no_conversation_name_line_and_turn(tmp_path: Path, conversation: list, message: str) -> None:
    good = {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}
    bad = {"conversations": [{"from": role, "value": text} for role, text in conversation]}
    path = write(tmp_path, "rows.jsonl", [good, bad, good])
    with pytest.raises(DataError, match=r"rows.jsonl:2: " + message):
        list(read_conversations(path))
    rows = list(read_rows(path))
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]


def test_explicit_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", [{"frage": "p", "kontext": "c", "antwort": "r"}])
    (one,) = read_conversations(path, Keys("frage", "kontext", "antwort"))
    assert one.messages == (Message("user", "p", "c"), Message("assistant", "r"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: fragen: is missing, .*prompt_key.*did you mean 'frage'"):
        list(read_conversations(path, Keys("fragen", None, "antwort")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, r"rows.jsonl:2: output: is missing, expected text"),
        ({"instruction": None, "output": "y"}, r"rows.jsonl:2: instruction: is null, expected text"),
        ({"instruction": "x", "output": 3}, r"rows.jsonl:2: output: is a number, expected text"),
        ({"instruction": "x", "input": ["a"], "output": "y"}, r"rows.jsonl:2: input: is a list, expected text"),
        (["instruction"], r"rows.jsonl:2: the row is a list, expected an object"),
    ],
)
def test_a_wrong_field_names_line_field_and_type(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_conversations(write(tmp_path, "rows.jsonl", [ALPACA, row])))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"", "the file is empty"),
        ("rows.json", b" \n\n", "the file is empty"),
        ("rows.json", b"[]", "the file holds no rows"),
        (
            "rows.jsonl",
            b'{"id": 1, "label": 2}',
            r"rows.jsonl:1: the fields are not known: 'id', 'label', expected instr",
        ),
        (
            "rows.jsonl",
            b'{"instruction": "x", "reply": "y"}',
            r"output: is missing.*response_key, one of 'instruction', 'r",
        ),
        ("rows.csv", b"instruction,output\nx,y\n", r"the format is not known, it begins 'instruction,output"),
        ("rows.parquet", b"PAR1\x00\x01", "the format is not known"),
    ],
)
def test_files_that_hold_no_rows_we_know(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_conversations(write(tmp_path, name, content)))


def test_a_pretty_printed_object_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "row.json", json.dumps(ALPACA, indent=2))
    assert [row.line for row in read_conversations(path)] == [1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_and_carriage_returns(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(ALPACA) + "\r\n" + json.dumps({**ALPACA, "output": "drei 三"}, ensure_ascii=False) + "\r\n"
    rows = list(read_conversations(write(tmp_path, "rows.jsonl", text.encode(encoding))))
    assert [row.messages[1].content for row in rows] == ["3", "drei 三"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_rows_and_texts(tmp_path: Path, suffix: str, pack) -> None:
    rows = write(tmp_path, "rows.json" + suffix, pack(json.dumps([ALPACA]).encode()))
    text = write(tmp_path, "text.txt" + suffix, pack(b"once upon a time"))
    assert [row.messages[1].content for row in read_conversations(rows)] == ["3"]
    assert [row.messages[0].content for row in read_conversations(text)] == ["once upon a time"]


def test_a_text_file_is_one_row_up_to_a_block(tmp_path: Path) -> None:
    lines = [f"line {number} " + "x" * 60 for number in range(40_000)]
    path = write(tmp_path, "book.txt", "\n".join(lines))
    rows = list(read_conversations(path))
    assert all(row.kind == "text" and len(row.messages[0].content) <= (1 << 20) for row in rows)
    assert 2 < len(rows) < 5
    assert "\n".join(row.messages[0].content for row in rows).rstrip("\n") == "\n".join(lines)
    assert lines[rows[1].line - 1] == rows[1].messages[0].content.split("\n", 1)[0]


def test_a_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    rows = list(read_conversations(write(tmp_path, "book.txt", "ab" * (1 << 20) + "\nend")))
    assert [len(row.messages[0].content) for row in rows] == [1 << 20, 1 << 20, 3]
    assert "".join(row.messages[0].content for row in rows) == "ab" * (1 << 20) + "end"


def test_rows_of_text(tmp_path: Path) -> None:
    (one,) = read_conversations(write(tmp_path, "rows.jsonl", [{"text": "all of it"}]))
    assert one.kind == "text" and turns([one]) == [[("assistant", "all of it")]]


def test_latin1_text_names_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"book.txt:2: byte 7 \(0xe9\) is not UTF-8"):
        list(read_conversations(write(tmp_path, "book.txt", b"one\ncaf\xe9\n")))


def test_fields_that_are_not_read_are_told_once(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write(tmp_path, "rows.jsonl", [{**ALPACA, "id": 7}, {**ALPACA, "id": 8}])
    list(read_rows(path, on_note=notes.append))
    assert notes == ["of each row 'instruction', 'input', 'output' are read, not 'id'"]


def test_fields_of_turns_and_of_later_rows_that_are_not_read_are_told(tmp_path: Path) -> None:
    notes: list[str] = []
    asks, says = {"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "weight": 1}
    rows = [{"messages": [asks, says], "system": [5]}, {"messages": [asks, {**says, "refusal": None}], "id": 8}]
    list(read_rows(write(tmp_path, "rows.jsonl", rows), on_note=notes.append))
    unread = "'messages[].name', 'id', 'messages[].refusal'"
    assert notes == [f"of each row 'messages', 'system' are read, not {unread}"]


def test_the_names_of_unread_fields_are_bounded(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write(tmp_path, "rows.jsonl", [{**ALPACA, f"k{i}": i} for i in range(40)])
    list(read_rows(path, on_note=notes.append))
    assert len(notes) == 1 and notes[0].endswith("'k10', 'k11' and more")


@pytest.mark.parametrize("content", ["Let me look.", [{"type": "text", "text": "Let me look."}]], ids=["text", "parts"])
def test_tool_calls_stand_behind_the_text(tmp_path: Path, content: object) -> None:
    says = {"role": "assistant", "content": content, "tool_calls": [{"id": "é"}]}
    (one,) = read_conversations(write(tmp_path, "rows.jsonl", [{"messages": [{"role": "user", "content": "a"}, says]}]))
    assert one.messages[1].content == 'Let me look.\n[{"id": "é"}]'


@pytest.mark.parametrize("weight", [0, 0.5])
def test_a_turn_of_another_weight_is_an_error(tmp_path: Path, weight: float) -> None:
    says = {"role": "assistant", "content": "b"}
    asks = {"role": "user", "content": "a"}
    rows = [{"messages": [asks, {**says, "weight": given}]} for given in (1, None, weight)]
    path = write(tmp_path, "rows.jsonl", rows)
    with pytest.raises(DataError) as error:
        list(read_conversations(path))
    assert (error.value.file, error.value.line, error.value.field) == (str(path), 3, "messages[1].weight")
    assert error.value.what == f"weight {weight} is not supported" and error.value.fix == "remove the row or the field"


def test_the_real_files(shared_data: Path) -> None:
    chats = list(read_conversations(shared_data / "sharegpt_zh_demo.json"))
    assert len(chats) == 300 and {m.role for c in chats for m in c.messages} == {"user", "assistant", "tool"}
    problems = list(read_conversations(shared_data / "gsm8k_train.jsonl", Keys("question", None, "answer")))
    assert len(problems) == 7473 and problems[-1].line == 7473 and "####" in problems[0].messages[1].content
    assert problems == list(read_conversations(shared_data / "gsm8k_train.jsonl"))  # these names are known
    assert len(list(read_conversations(shared_data / "alpaca_zh_demo.json"))) == 1000
    texts = list(read_conversations(shared_data / "wikitext2" / "valid.txt"))
    whole = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    assert "\n".join(row.messages[0].content for row in texts) == whole.removesuffix("\n")
