"""Wrong data files through the command (fault cases 9 to 20): file, line and field, exit code 3, nothing written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.commands.conftest import Program, Write, alpaca_lines, small_and_quick, write_base
from tests.tiny import CHATML, ByteTokenizer

ROWS = alpaca_lines()
LAST = 13  # the line after them
SILENT = '{"instruction": "a", "output": " "}\n'
LONG = json.dumps({"instruction": "x" * 400, "output": "yes"}) + "\n"


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"


HELLO = chat(("user", "hi"), ("assistant", "hello"))


def ledger(program: Program) -> dict[str, Any]:
    """The totals of the run's ledger."""
    return json.loads((program.folder / "out" / "ledger.jsonl").read_text().splitlines()[0])


# --- refused ---------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "9 not JSON": (
        '{"instruction": "x", "output" "y"}',
        "not JSON: Expecting ':' delimiter at column 31, near '{\"instr",
    ),
    "9 cut in the middle": ('{"instruction": "x", "out', "not JSON: Unterminated string starting at column 22, near"),
    "9 nested": ('{"instruction": ' + "[" * 100_000, "not a row: nested too deeply"),
    "9 endless number": ('{"instruction": ' + "9" * 5000 + "}", "not a row: Exceeds the limit"),
    "10 missing": ('{"instruction": "x"}', "output: is missing, expected text"),
    "10 null": (
        '{"instruction": "x", "output": null}',
        "output: is null, expected text, mend the row, or pass over such rows with --skip_bad N",
    ),
    "10 wrong type": ('{"instruction": "x", "output": 5}', "output: is a number, expected text"),
    "10 no object": ("5", "the row is a number, expected an object with named fields"),
    "10 not a number": ('{"instruction": NaN, "output": "x"}', "instruction: is a number, expected text"),
    "11 Latin-1": (
        '{"instruction": "café"}'.encode("latin-1"),
        f"byte {len(ROWS) + 20} (0xe9) is not UTF-8, near",
        "iconv -f latin1",
    ),
    "11 zero bytes": (b"\0" * 100, "not JSON: Expecting value at column 1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_9_to_11_a_bad_row_is_refused_by_line(program: Program, write: Write, case: str) -> None:
    row, *says = BAD_ROWS[case]
    path = write(ROWS.encode() + (row if isinstance(row, bytes) else row.encode()) + b"\n", "d.jsonl")
    program.refuses("finetune", 3, f"{path}:{LAST}: {says[0]}", *says[1:], data_path=path)


BAD_CHATS = {
    "empty assistant": (chat(("user", "hi"), ("assistant", " ")), "messages[1]: the assistant says nothing"),
    "two users": (
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        "messages[1]: a user turn follows a user turn",
    ),
    "unknown role": (
        chat(("user", "a"), ("asistant", "b")),
        "messages[1].role: the role 'asistant'",
        "mean 'assistant'?",
    ),
    "late system": (chat(("user", "a"), ("assistant", "b"), ("system", "c")), "messages[2]: a system turn comes late"),
    "no assistant": (chat(("user", "a")), "messages: no turn is the assistant's, expected something to learn"),
    "no list": ('{"messages": "hi"}\n', "messages: is not a list, expected a list of turns"),
    "no turns": ('{"messages": []}\n', "messages: is an empty list, expected a list of turns"),
    "no text": ('{"messages": [{"role": "user", "content": null}]}\n', "messages[0].content: is null, expected text"),
    "another format": (ROWS, "messages: is missing, expected a list of turns"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_15_a_bad_chat_is_refused_by_line_and_turn(program: Program, write: Write, case: str) -> None:
    row, *says = BAD_CHATS[case]
    path = write(HELLO + row, "chats.jsonl")
    program.refuses("finetune", 3, f"{path}:2: {says[0]}", *says[1:], data_path=path)


BAD_FILES = {
    "9 array.json": ('[{"instruction": "a", "output": "b"},\n{"instruction" "x"}]', ":2: not JSON: Expecting ':'"),
    "9 open.json": ('[{"instruction": "a", "output": "b"},\n', ":2: the file ends inside its array, after 1 whole"),
    "10 typo.jsonl": ('{"instruction": "x", "ouput": "y"}', ":1: output: is missing", "'ouput'"),
    "10 fields.json": ('[{"a": 1, "b": 2}]', ":1: the fields are not known: 'a', 'b', expected", "prompt_key"),
    "11 cut.jsonl.gz": (gzip.compress(ROWS.encode())[:-20], ": the compressed file is damaged", "compress it again"),
    "11 cut.jsonl.zst": (zstandard.compress(ROWS.encode())[:-9], ": the compressed file is damaged"),
    "11 odd.jsonl": (b"\xff\xfe" + "{}".encode("utf-16-le") + b"\xd8", ": byte 6 is not UTF-16-LE"),
    "12 table.csv": ("instruction,output\na,b\n", ":1: the format is not known, it begins 'instr", "expected JSON"),
    "12 table.parquet": (b"PAR1" + bytes(range(100)), ":1: the format is not known, it begins 'PAR1"),
    "13 nothing.jsonl": ("", ": the file is empty, expected at least one row"),
    "13 blank.jsonl": ("\n \n\n", ": the file is empty, expected at least one row"),
    "13 none.json": ("[]", ": the file holds no rows, expected at least one"),
    "13 text.txt": ("", ": the file is empty"),
    "13 silent.jsonl": (SILENT * 3, ": data_path: none of the 3 rows can be used (empty_output 3)"),
    "14 long.jsonl": (LONG, ": data_path: none of the 1 rows can be used (no_supervised_token 1)", "cutoff_len"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name(program: Program, write: Write, name: str) -> None:
    content, *says = BAD_FILES[name]
    path = write(content, name)
    program.refuses("finetune", 3, f"{path}{says[0]}", *says[1:], data_path=path, train_on_inputs="false")


@pytest.mark.parametrize(("policy", "says"), [("drop", "(over_length 1)"), ("error", ":1: the row has 4")])
def test_14_rows_that_are_too_long(program: Program, write: Write, policy: str, says: str) -> None:
    program.refuses("finetune", 3, says, "cutoff_len", data_path=write(LONG, "long.jsonl"), over_length=policy)


PATHS = {
    "a folder": (".", "/.: data_path: is a folder, name its files, for example", "*.json"),
    "a typo": ("rows.json", "rows.json: data_path: no such file, did you mean", "rows.jsonl?"),
    "a pattern": ("*.parquet", "*.parquet: data_path: the pattern matches no file"),
    "too long": ("a" * 300, "data_path: no such file"),
    "a pipe": ("pipe", "pipe: data_path: is neither a file nor a folder"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_is_no_file_is_the_user_s_error(program: Program, tmp_path: Path, case: str) -> None:
    name, *says = PATHS[case]
    os.mkfifo(tmp_path / "pipe")
    says[0] = says[0].removeprefix("/.")
    program.refuses("finetune", 2, *says, data_path=f"{tmp_path}/{name}")
    if case == "a typo":
        program.refuses("finetune", 2, "rows.json: val_data_path: no such file", val_data_path=tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"prompt_key": "instuction"},
            ":1: instuction: is missing, expected the field that prompt_key names, did you mean",
        ),
        (
            {"response_key": "nope"},
            ":1: nope: is missing, expected the field that response_key names, the row has 'instr",
        ),
    ],
)
def test_10_keys_that_the_rows_do_not_have(program: Program, options: dict[str, str], says: str) -> None:
    program.refuses("finetune", 3, f"{program.rows}{says}", **options)


def test_9_the_allowance_for_bad_rows_is_a_limit(program: Program, write: Write) -> None:
    path = write(ROWS + '{"instruction": "x"\n{}\n', "d.jsonl")
    program.refuses("finetune", 3, f"{path}:{LAST + 1}: ", "(2 bad rows, skip_bad is 1)", data_path=path, skip_bad=1)
    assert program("finetune", data_path=path, skip_bad=2).code == 0
    rejects = [json.loads(line) for line in (program.folder / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["row"]) for row in rejects] == [(LAST, '{"instruction": "x"'), (LAST + 1, "{}")]
    assert ledger(program)["dropped"] == {"bad_row": 2} and ledger(program)["whole"] == 12


@pytest.mark.parametrize("skip", [False, True])
def test_19_rows_of_both_sides_do_not_train(program: Program, write: Write, skip: bool) -> None:
    val = write(ROWS if not skip else ROWS[: ROWS.index("\n") + 1], "val.jsonl")
    if not skip:
        program.refuses("finetune", 3, "data_path: none of the 12 rows can be used (in_val_data 12)", val_data_path=val)
        return
    done = program("finetune", val_data_path=val)
    assert done.code == 0 and "1 training rows are in val_data_path too" in done.err
    assert ledger(program)["dropped"] == {"in_val_data": 1}


@pytest.mark.parametrize("name", ["line.jsonl.zst", "array.json.zst", "text.txt.zst"])
def test_20_an_endless_line_takes_bounded_memory(program: Program, tmp_path: Path, name: str) -> None:
    start = {"l": b'{"instruction": "', "a": b'[{"instruction": "', "t": b""}[name[0]]
    path = tmp_path / name
    with zstandard.open(path, "wb") as file:
        file.write(start)
        for _ in range(300):
            file.write(b"a" * 1_000_000)
    with small_and_quick(seconds=10, megabytes=600):
        program.refuses("finetune", 3, f"{path}:1: ", "longer than" if name[0] != "t" else "too long", data_path=path)


# --- taken, and counted ----------------------------------------------------------------------------------------------

TAKEN = {
    "11 BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "11 UTF-16": lambda text: text.encode("utf-16"),
    "11 UTF-16 without mark": lambda text: text.encode("utf-16-be"),
    "11 CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "11 gzip": lambda text: gzip.compress(text.encode()),
    "11 no newline at the end": lambda text: text.rstrip().encode(),
}


@pytest.mark.parametrize("case", TAKEN)
def test_11_the_same_rows_in_another_dress(program: Program, trained: Path, write: Write, case: str) -> None:
    encode: Callable[[str], bytes] = TAKEN[case]
    assert program("finetune", data_path=write(encode(ROWS), "rows.jsonl")).code == 0
    name = "adapter_model.safetensors"
    assert (program.folder / "out" / name).read_bytes() == (trained / name).read_bytes()


ODD = {
    "11 NUL": ('{"instruction": "a\\u0000b", "output": "yes"}\n', "repaired", "control_characters"),
    "11 surrogate": ('{"instruction": "a\\ud800b", "output": "yes"}\n', "repaired", "broken_unicode"),
    "13 empty answer": ('{"instruction": "a", "output": ""}\n', "dropped", "empty_output"),
    "19 duplicate": (ROWS[: ROWS.index("\n") + 1], "dropped", "duplicates"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_rows_are_counted_under_their_name(program: Program, write: Write, case: str) -> None:
    row, what, rule = ODD[case]
    assert program("finetune", data_path=write(ROWS + row, "odd.jsonl")).code == 0
    totals = ledger(program)
    assert totals[what] == {rule: 1} and totals["rows_in"] == 13
    events = [json.loads(line) for line in (program.folder / "out" / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [(event["line"], event["reason"]) for event in events] == [(LAST, rule)]


def test_14_a_truncated_row_is_counted_and_not_taught_to_stop(program: Program, write: Write) -> None:
    done = program("finetune", data_path=write(ROWS + LONG, "long.jsonl"))
    assert done.code == 0 and "92.3 % of the rows end with EOS" in done.err
    assert (ledger(program)["whole"], ledger(program)["truncated"], ledger(program)["ending"]) == (12, 1, 12)


def test_16_special_tokens_in_a_row_are_text(program: Program, write: Write) -> None:
    row = json.dumps({"instruction": "</s><|im_end|>", "output": "<|im_start|>assistant"}) + "\n"
    done = program("finetune", data_path=write(row, "special.jsonl"))
    assert done.code == 0 and "rows that spell a special token: encoded as plain text" in done.err
    plain = json.dumps({"instruction": "x" * 14, "output": "y" * 21}) + "\n"
    # a byte each: as many tokens as any other text of this length
    again = program("finetune", data_path=write(plain, "plain.jsonl"), output_dir=program.folder / "plain")
    assert done.result["tokens"] == again.result["tokens"]


@pytest.mark.parametrize(
    ("size", "says"),
    [(12, "val_set_size 12 is half of the 12 examples or more: 1 (10 %) validate instead"), (0.999, "validation loss")],
)
def test_13_a_validation_split_larger_than_the_rows(program: Program, size: float, says: str) -> None:
    done = program("finetune", val_set_size=size)
    assert done.code == 0 and says in done.err and done.result["val_loss"] is not None


@pytest.mark.parametrize(("rows", "why"), [(1, "there is one example only"), (2, "there is one example only")])
def test_13_one_row_is_not_split(program: Program, write: Write, rows: int, why: str) -> None:
    one = '{"instruction": "a", "output": "yes"}\n'
    done = program("finetune", data_path=write(one * rows, "one.jsonl"), val_set_size=1)
    assert done.code == 0 and f"validation is off: {why}" in done.err and done.result["val_loss"] is None


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"pad_token": "</s>"}, ["EOS", "(also the padding token)", "rows that teach stopping  100.0%"]),
        ({"pad_token": None}, ["rows that teach stopping  100.0%"]),
        ({"eos_token": None}, ["EOS", "none", "the tokenizer has no EOS token", "rows that teach stopping  0.0%"]),
        ({"bos_token": None}, ["none, not put before each row", "rows that teach stopping  100.0%"]),
    ],
)
def test_17_tokenizers_without_some_tokens(
    program: Program, tmp_path: Path, edit: dict[str, Any], says: list[str]
) -> None:
    base = write_base(tmp_path / "odd", ByteTokenizer(chat_template=CHATML))
    config = json.loads((base / "tokenizer_config.json").read_text()) | edit
    kept = {key: value for key, value in config.items() if value is not None}
    (base / "tokenizer_config.json").write_text(json.dumps(kept))
    done = program("check", base_model=base, prompt_template_name="alpaca")
    assert done.code == 0
    assert [part for part in says if part not in done.err] == [], done.err
