"""The whole road: files -> tables, ledger, cache, split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.prepare import prepare
from alpaca_lora.errors import DataError, UserError
from alpaca_lora.text.templates import load_template
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.gguf import open_gguf
from tests.data.rows import alpaca_rows, chat_tokenizer, prepare_rows, shown, write_rows
from tests.tiny import ByteTokenizer


def answers(table) -> set[str]:
    return {shown(one.ids_T).split("### Response:\n")[1] for one in table}


def test_rows_become_two_tables(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(50))
    prepared = prepare_rows(path, val_set_size=10)
    assert prepared.val is not None and (len(prepared.train), len(prepared.val)) == (40, 10)
    assert not answers(prepared.train) & answers(prepared.val)
    assert answers(prepared.train) | answers(prepared.val) == {r["output"].strip() + "</s>" for r in alpaca_rows(50)}
    assert prepared.ledger.rows_in == prepared.ledger.whole == 50 and prepared.messages == []
    assert [one.index for one in prepared.val] == list(range(10))
    assert list(prepared.data_hashes) == [str(path)]


def test_the_samples_are_rows_that_validate(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(50))
    for size, count in ((10, 10), (20, 16), (0, 16)):
        prepared = prepare_rows(path, val_set_size=size)
        found = {row.messages[1].content + "</s>" for row in prepared.samples}
        assert len(found) == count and found <= answers(prepared.val or prepared.train)


def test_the_second_time_comes_from_the_cache_and_is_the_same(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [*alpaca_rows(40), alpaca_rows(1)[0], {"instruction": "x", "output": ""}]
    )
    first, second = (prepare_rows(path, val_set_size=5) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert [one.ids_T.tolist() for one in first.train] == [one.ids_T.tolist() for one in second.train]
    assert first.fingerprint == second.fingerprint and first.samples == second.samples
    assert first.ledger.rows() == second.ledger.rows()
    assert list(first.ledger.events()) == list(second.ledger.events())
    assert first.ledger.dropped == {"duplicates": 1, "empty_output": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"cutoff_len": 200}, {"train_on_inputs": False}, {"add_eos_token": False}, {"over_length": "drop"},
        {"skip_cleaning": ["whitespace"]}, {"train_on_turns": "last"}, {"skip_bad": 1},
        {"prompt_key": "instruction", "response_key": "output"},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_that_matters_makes_another_entry(tmp_path: Path, change: dict) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    before = prepare_rows(path, val_set_size=0)
    after = prepare_rows(path, val_set_size=0, **change)
    assert not after.from_cache and after.fingerprint != before.fingerprint


def test_options_that_do_not_change_rows_share_an_entry(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    prepare_rows(path, val_set_size=0)
    moved = path.rename(tmp_path / "moved.jsonl")
    again = prepare_rows(moved, val_set_size=2, batch_size=3, group_by_length=True)
    assert again.from_cache and again.val is not None and list(again.data_hashes) == [str(moved)]
    assert not prepare_rows(moved, ByteTokenizer(add_bos=False)).from_cache
    assert not prepare_rows(moved, chat_tokenizer()).from_cache


def test_edited_data_has_another_hash(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    before = prepare_rows(path, val_set_size=0)
    write_rows(path, alpaca_rows(11))
    after = prepare_rows(path, val_set_size=0)
    assert before.data_hashes != after.data_hashes and not after.from_cache and len(after.train) == 11


def test_a_damaged_entry_is_rebuilt_with_a_message(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    before = prepare_rows(path, val_set_size=0)
    (entry,) = (home / "data").iterdir()
    data = bytearray((entry / "tokens.i32").read_bytes())
    del before
    data[100] ^= 1
    (entry / "tokens.i32").write_bytes(data)
    after = prepare_rows(path, val_set_size=0)
    assert not after.from_cache and "tokens.i32 has changed since it was written" in after.messages[0]
    assert prepare_rows(path, val_set_size=0).from_cache


def test_without_a_cache_nothing_is_kept(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    for _ in range(2):
        prepared = prepare_rows(path, val_set_size=0, data_cache=False)
        assert len(prepared.train) == 10 and not prepared.from_cache
    assert os.listdir(home) == []


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ALPACA_LORA_HOME", str(tmp_path / "file"))
    prepared = prepare_rows(write_rows(tmp_path / "rows.jsonl", alpaca_rows(10)), val_set_size=0)
    assert len(prepared.train) == 10 and "the data cache cannot be written" in prepared.messages[0]


def test_a_stop_while_reading_leaves_no_half_entry(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))

    def stop(what: str, done: int, total: int) -> None:
        if what == "reading rows":
            raise KeyboardInterrupt

    tokenizer = ByteTokenizer()
    options = DataOptions(data_path=[str(path)])
    with pytest.raises(KeyboardInterrupt):
        prepare(options, tokenizer, load_template("alpaca", tokenizer), on_progress=stop)
    assert os.listdir(home / "data") == []


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(10))
    seen: dict[str, tuple[int, int]] = {}
    tokenizer = ByteTokenizer()
    template = load_template("alpaca", tokenizer)
    prepare(
        DataOptions(data_path=[str(path)]), tokenizer, template,
        on_progress=lambda what, done, total: seen.update({what: (done, total)}),
    )  # fmt: skip
    size = path.stat().st_size
    assert seen == {"hashing files": (size, size), "reading rows": (size, size)}


def test_the_seed_changes_the_fingerprint_but_not_the_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(30))
    tokenizer = ByteTokenizer()
    template = load_template("alpaca", tokenizer)
    options = DataOptions(data_path=[str(path)], val_set_size=5)
    one, two = (prepare(options, tokenizer, template, seed=seed) for seed in (1, 2))
    assert answers(one.val) == answers(two.val) and one.fingerprint != two.fingerprint


def test_duplicates_are_dropped_once_and_never_straddle(tmp_path: Path) -> None:
    rows = alpaca_rows(20)
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *rows, {**rows[3], "output": rows[3]["output"].upper() + "!"}])
    prepared = prepare_rows(path, val_set_size=5)
    assert prepared.ledger.dropped == {"duplicates": 20}
    lines = sorted(event.line for event in prepared.ledger.events() if event.reason == "duplicates")
    assert lines == list(range(21, 41))
    kept = prepare_rows(path, val_set_size=5, skip_cleaning=["duplicates"])
    assert kept.val is not None and len(kept.train) + len(kept.val) == 41
    assert not answers(kept.train) & answers(kept.val)


def test_rows_of_the_validation_file_leave_the_training_rows(tmp_path: Path) -> None:
    rows = alpaca_rows(20)
    path = write_rows(tmp_path / "train.jsonl", rows)
    near = {**rows[7], "output": rows[7]["output"] + "."}
    val = write_rows(tmp_path / "val.jsonl", [rows[2], rows[5], near, {"instruction": "new", "output": "one"}])
    prepared = prepare_rows(path, val_data_path=[str(val)], val_set_size=7)
    assert prepared.val is not None and (len(prepared.train), len(prepared.val)) == (18, 4)
    assert prepared.ledger.dropped == {"in_val_data": 2} and prepared.ledger.rows_in == 24
    assert prepared.messages[0].startswith("2 training rows are in val_data_path too")
    assert prepared.messages[1].startswith("1 training rows differ from a validation row by case")
    unused = "val_set_size 7 is not used: val_data_path says which rows validate"
    default = prepare_rows(path, val_data_path=[str(val)])
    assert unused in prepared.messages and not any("val_set_size" in told for told in default.messages)
    assert prepared.fingerprint == default.fingerprint
    assert {Path(name).name for name in prepared.data_hashes} == {"train.jsonl", "val.jsonl"}
    with pytest.raises(DataError, match=r"train.jsonl: data_path: none of the 20 rows can be used \(in_val_data 20\)"):
        prepare_rows(path, val_data_path=[str(path)])


def test_small_sets(tmp_path: Path) -> None:
    few = prepare_rows(write_rows(tmp_path / "few.jsonl", alpaca_rows(30)))
    assert few.val is not None and len(few.val) == 3 and "3 (10 %) validate instead" in few.messages[0]
    one = prepare_rows(write_rows(tmp_path / "one.jsonl", alpaca_rows(1)))
    assert one.val is None and len(one.train) == 1 and "validation is off" in one.messages[0]


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "x", "output": ""}] * 3)
    with pytest.raises(DataError, match=r"none of the 3 rows can be used \(empty_output 3\)"):
        prepare_rows(path)
    path = write_rows(tmp_path / "long.jsonl", alpaca_rows(5))
    with pytest.raises(DataError, match=r"\(no_supervised_token 5\)"):
        prepare_rows(path, cutoff_len=16, train_on_inputs=False)
    with pytest.raises(DataError, match=r"\(over_length 5\)"):
        prepare_rows(path, cutoff_len=16, over_length="drop")
    with pytest.raises(UserError, match="no such file"):
        prepare_rows(tmp_path / "nowhere.json")


def test_bad_rows_up_to_skip_bad_are_passed_over_and_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*alpaca_rows(5), {"instruction": "no output"}])
    path.write_text(path.read_text() + "{broken\n" + json.dumps(alpaca_rows(7)[6]) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:6: output: is missing, expected text, .*--skip_bad N"):
        prepare_rows(path)
    with pytest.raises(DataError, match=r"rows.jsonl:7: not JSON: .* \(2 bad rows, skip_bad is 1\)"):
        prepare_rows(path, skip_bad=1)
    for _ in range(2):  # the rejects are in the cache too
        prepared = prepare_rows(path, skip_bad=2, val_set_size=0)
        assert len(prepared.train) == 6 and prepared.ledger.dropped == {"bad_row": 2}
        written = prepared.ledger.write(tmp_path / "out")
        rejects = [json.loads(line) for line in written[1].read_text().splitlines()]
        assert [reject["line"] for reject in rejects] == [6, 7] and rejects[1]["row"] == "{broken"


def test_what_does_not_end_is_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))
    cut = prepare_rows(path, cutoff_len=200, val_set_size=0)
    assert 0 < cut.ledger.truncated < 20
    share = 100 * cut.ledger.whole / 20
    assert cut.messages == [
        f"{share:.1f} % of the rows end with EOS or an end-of-turn token "
        f"({cut.ledger.truncated} are truncated at cutoff_len 200)"
    ]
    never = prepare_rows(path, add_eos_token=False, val_set_size=0)
    assert never.messages == ["0.0 % of the rows end with EOS or an end-of-turn token (add_eos_token is false)"]
    bare = ByteTokenizer()
    bare.eos_id, bare.stop_ids = None, ()
    assert "no EOS token" in prepare_rows(path, bare, val_set_size=0).messages[0]
    last = prepare_rows(path, train_on_turns="last", val_set_size=0)
    assert "train_on_turns last does nothing" in last.messages[0]


def test_special_text_is_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "say </s>", "output": "no"}, *alpaca_rows(3)])
    assert prepare_rows(path, val_set_size=0).ledger.special_text == 1


def test_a_text_file_becomes_pieces(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Sentence number {i}.\n" for i in range(100)), encoding="utf-8")
    prepared = prepare_rows(path, cutoff_len=64, val_set_size=3)
    assert prepared.val is not None and len(prepared.val) == 3
    assert prepared.ledger.rows_in == prepared.ledger.whole == prepared.ledger.split_texts == 1
    assert prepared.ledger.examples == len(prepared.train) + 3 and prepared.train.lengths.max() == 64
    assert prepared.ledger.end_share == 1
    twice = tmp_path / "again.txt"
    twice.write_bytes(path.read_bytes())
    both = prepare_rows(tmp_path / "*.txt", cutoff_len=64, val_set_size=0)
    assert both.ledger.dropped == {"duplicates": 1} and len(both.train) == prepared.ledger.examples


def test_many_files_and_globs(tmp_path: Path) -> None:
    rows = alpaca_rows(9)
    for part in range(3):
        write_rows(tmp_path / f"part{part}.jsonl", rows[part::3])
    prepared = prepare_rows(tmp_path / "part*.jsonl", val_set_size=0)
    assert len(prepared.train) == 9 and len(prepared.ledger.files) == 3
    file, line = prepared.train.origin(8)
    assert Path(prepared.ledger.files[file]).name == "part2.jsonl" and line == 3


def test_preparing_does_not_import_torch() -> None:
    code = "import sys; import alpaca_lora.data.prepare, alpaca_lora.data.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_chats(shared_data: Path) -> None:
    prepared = prepare_rows(
        shared_data / "sharegpt_zh_demo.json", chat_tokenizer(), cutoff_len=8192, train_on_inputs=False, val_set_size=20
    )
    assert prepared.ledger.rows_in == 300 and prepared.ledger.dropped == {"duplicates": 43}
    assert prepared.ledger.whole == 257 and prepared.ledger.end_share == 1
    assert prepared.messages[0].endswith("not 'tools'")
    text = shown(prepared.train[0].ids_T[prepared.train[0].supervised_T])
    assert text.endswith("<|im_end|>") and "user" not in text


def test_real_problems(shared_data: Path) -> None:
    prepared = prepare_rows(
        shared_data / "gsm8k_test.jsonl",
        prompt_key="question",
        response_key="answer",
        cutoff_len=4096,
        val_set_size=0.1,
    )
    assert prepared.ledger.rows_in == 1319 and prepared.val is not None and len(prepared.val) == 132


def test_real_alpaca_rows_with_the_real_tokenizer(shared_data: Path, smollm2: Path, tmp_path: Path) -> None:
    with closing(open_gguf(smollm2)) as model:
        tokenizer = Tokenizer.from_gguf(model.tokenizer_fields)
    rows = json.loads((shared_data / "alpaca_data.json").read_bytes())[:3000]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    options = DataOptions(data_path=[str(path)], train_on_inputs=False, val_set_size=500)
    template = load_template("alpaca", tokenizer)
    prepared = prepare(options, tokenizer, template)
    ledger = prepared.ledger
    assert ledger.rows_in == 3000 and prepared.val is not None and len(prepared.val) == 500
    assert len(prepared.train) == ledger.kept - 500
    assert ledger.end_share > 0.998 and ledger.straddling == 0
    one = prepared.train[0]
    assert tokenizer.decode(one.ids_T.tolist()).startswith("Below is an instruction that describes a task.")
    learned = tokenizer.decode(one.ids_T[one.supervised_T].tolist(), skip_special=False)
    assert learned.startswith("1.Eat a balanced diet") and learned.endswith("<|im_end|>")
    assert prepare(options, tokenizer, template).from_cache
