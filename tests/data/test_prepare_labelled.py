"""The whole road of a classification run: files -> tables with classes, counts, messages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alpaca_lora.data.examples import Batch, TokenizedExample
from alpaca_lora.data.loader import Loader
from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.prepare import Prepared, prepare
from alpaca_lora.errors import ConfigError, DataError
from tests.data.rows import shown
from tests.tiny import ByteTokenizer

Rows = list[tuple[str, Any]]
EOS = 257


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


def rows(count: int, labels: tuple[str, ...] = ("neg", "pos")) -> Rows:
    return [(f"text number {i} of y{'x' * (i * 7 % 13)}", labels[i % len(labels)]) for i in range(count)]


def classify(path: Path, **options: Any) -> Prepared:
    options = {"task": "classification", "val_set_size": 0, **options}
    return prepare(DataOptions(data_path=[str(path)], **options), ByteTokenizer(), None, seed=1)


def pairs(prepared: Prepared) -> Rows:
    """(text, label) of the training rows as they will be learned."""
    found = []
    for one in prepared.train:
        assert one.label is not None
        found.append((shown(one.ids_T).removeprefix("<s>").removesuffix("</s>"), prepared.labels[one.label]))
    return found


def test_rows_become_texts_with_classes(tmp_path: Path) -> None:
    prepared = classify(write(tmp_path / "rows.tsv", rows(21)))
    assert prepared.labels == ("neg", "pos") and pairs(prepared) == rows(21)
    assert prepared.class_counts == (11, 10) and prepared.val_class_counts == () and prepared.val is None
    assert prepared.ledger.rows_in == prepared.ledger.whole == 21 and prepared.ledger.end_share == 1
    assert prepared.train.num_supervised_tokens == 21
    assert prepared.messages == [f"{tmp_path}/rows.tsv: no header; the text is in column 1, the label in column 2"]


def test_the_second_time_comes_from_the_cache_and_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", rows(21))
    first, second = (classify(path, val_set_size=5) for _ in range(2))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert pairs(first) == pairs(second) and first.labels == second.labels
    assert first.fingerprint == second.fingerprint and first.val_class_counts == second.val_class_counts
    assert first.samples == second.samples and first.samples[0].kind == "labelled"
    assert not classify(path, add_eos_token=True).from_cache
    assert not classify(path, text_key="1", label_key="2").from_cache


def test_a_step_takes_each_text_once(tmp_path: Path) -> None:
    prepared = classify(write(tmp_path / "rows.tsv", rows(21)))
    loader = Loader(prepared.train, batch_size=8, token_budget=60, seed=1)
    step = loader.step_batch(0)
    assert step.num_supervised == step.num_examples == 8 and len(step.micro_batches) > 1
    for batch in step.micro_batches:
        ends = [sum(batch.lengths[: i + 1]) - 1 for i in range(len(batch.lengths))]
        assert batch.label_rows_N.tolist() == ends
        assert batch.label_ids_N.tolist() == [prepared.train[i].label for i in batch.indices]
        assert all(batch.ids_T[end] in b"yx" for end in ends)  # the texts' own last letters


def test_labels_and_texts_do_not_mix() -> None:
    table = [TokenizedExample(np.array([1, 2], np.int32), np.array([False, True]), 0, label) for label in (0, None)]
    with pytest.raises(AssertionError, match="texts to classify and others"):
        Batch.pack(table)


def test_duplicates_go_and_contradictions_stay_and_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", [*rows(6), ("same", "pos"), ("same", "neg"), ("same", "pos"), ("Same!", "neg")])
    prepared = classify(path)
    ledger = prepared.ledger
    assert ledger.dropped == {"duplicates": 1} and ledger.contradictory == 2 and len(prepared.train) == 9
    events = [(event.line, event.action) for event in ledger.events()]
    assert events == [(9, "dropped"), (7, "contradictory"), (8, "contradictory")]
    assert f"2 rows have a text that other rows give another label, the first at {path}:7" in prepared.messages[-1]
    assert ("contradictory", 2, "same text, other label: kept") in ledger.rows()
    kept = classify(path, skip_cleaning=["duplicates"])
    assert kept.ledger.contradictory == 3 and len(kept.train) == 10
    assert classify(write(path, rows(6))).ledger.contradictory == 0


def test_what_cleaning_leaves_nothing_of_is_dropped(tmp_path: Path) -> None:
    prepared = classify(write(tmp_path / "rows.tsv", [*rows(4), ("\x00\x01", "pos"), ("\x00fine", "pos")]))
    assert prepared.ledger.dropped == {"empty_output": 1} and prepared.ledger.repaired == {"control_characters": 2}
    assert pairs(prepared)[-1] == ("fine", "pos")


def test_the_split_keeps_equal_texts_together_and_rare_labels_in_training(tmp_path: Path) -> None:
    data = [*rows(60), ("same", "pos"), ("Same", "neg"), ("once", "rare")]
    for size in range(1, 30):  # some of these would put the rare row on the other side
        prepared = classify(write(tmp_path / "rows.tsv", data), val_set_size=size)
        assert prepared.labels == ("neg", "pos", "rare") and prepared.class_counts[2] == 1
        texts = {text.casefold() for text, _ in pairs(prepared)}
        assert prepared.val is None or not {shown(one.ids_T)[3:-4].casefold() for one in prepared.val} & texts
    assert any("so few rows that none of them validates: 'rare'" in message for message in prepared.messages)
    assert any("no validation row has the label 'rare'" in message for message in prepared.messages)


def test_a_validation_file_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", rows(21))
    val = write(tmp_path / "val.tsv", [("new one", "pos"), rows(21)[3], ("new two", "pos")])
    prepared = classify(path, val_data_path=[str(val)], val_set_size=2000)
    assert prepared.val is not None and len(prepared.val) == 3
    assert prepared.val_class_counts == (0, 3) and prepared.class_counts == (11, 9)
    assert prepared.ledger.dropped == {"in_val_data": 1}
    assert prepared.messages[-1] == "no validation row has the label 'neg': the figures say nothing of it"
    # the classes are numbered by the training rows, whatever comes first in the validation file
    assert [prepared.labels[one.label] for one in prepared.val if one.label is not None] == ["pos"] * 3


def test_labels_that_cannot_be_are_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", rows(6))
    val = write(tmp_path / "val.tsv", [("new", "pos"), ("newer", "pso")])
    with pytest.raises(
        DataError, match=r"val.tsv:2: no training row has the label 'pso', expected one of 'neg', 'pos', did you mean"
    ):
        classify(path, val_data_path=[str(val)])
    with pytest.raises(DataError, match=r"rows.tsv: all training rows have the label 'x', expected rows of two"):
        classify(write(path, rows(6, ("x",))))
    write(path, [*rows(6), ("text", "")])
    with pytest.raises(DataError, match=r"rows.tsv:7: column 2: is empty, expected a word .*--skip_bad N"):
        classify(path)
    prepared = classify(path, skip_bad=1)
    assert prepared.ledger.dropped == {"bad_row": 1} and prepared.ledger.rejects[0]["row"] == "text\t"


def test_options_and_labels_that_look_wrong_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", [(f"text {i}", f"label {i}") for i in range(6)])
    told = classify(path, label_key="2", text_key="1", train_on_inputs=False).messages
    assert "6 labels for 6 training rows: is label_key the right column?" in told
    assert "train_on_inputs does nothing in classification: the label alone is learned" in told
    lopsided = [(f"text {i}", "rare" if i == 3 else "common") for i in range(30)]
    assert "'common' has 29 training rows, 'rare' 1" in classify(write(path, lopsided)).messages[-1]


@pytest.mark.parametrize("add_eos_token", [None, False, True])
def test_eos_ends_a_text_only_where_it_is_asked_for(tmp_path: Path, add_eos_token: bool | None) -> None:
    given = {} if add_eos_token is None else {"add_eos_token": add_eos_token}
    prepared = classify(write(tmp_path / "rows.tsv", rows(8)), **given)
    assert {int(one.ids_T[-1]) == EOS for one in prepared.train} == {bool(add_eos_token)}
    assert DataOptions(data_path=["x"]).add_eos_token  # an answer is ended as ever
    assert DataOptions.model_validate({"data_path": ["x"], "task": "generation"}).add_eos_token


def test_a_cut_text_is_counted_and_still_ended(tmp_path: Path) -> None:
    prepared = classify(write(tmp_path / "rows.tsv", rows(8)), cutoff_len=10, add_eos_token=True)
    assert prepared.ledger.truncated == 8 and ("kept, truncated", 8, "cut at cutoff_len") in prepared.ledger.rows()
    assert {int(one.ids_T[-1]) for one in prepared.train} == {EOS} and prepared.train.lengths.max() == 10
    assert not any("EOS" in message for message in prepared.messages)
    assert "8 of the texts (100.0 %) are above cutoff_len 10: only their beginning is read" in prepared.messages
    whole = classify(tmp_path / "rows.tsv")
    assert not any("cutoff_len" in message for message in whole.messages)


def test_no_room_for_a_text_is_a_wrong_cutoff(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", rows(8))
    with pytest.raises(ConfigError, match="cutoff_len: 2 leaves no room for a text beside BOS and EOS"):
        classify(path, cutoff_len=2, add_eos_token=True)
    assert set(classify(path, cutoff_len=2).train.lengths) == {2}


def test_eos_that_is_padding_too_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", rows(8))
    tokenizer = ByteTokenizer()
    tokenizer.pad_id = tokenizer.eos_id
    for add_eos_token in (False, True):
        options = DataOptions(task="classification", data_path=[str(path)], val_set_size=0, add_eos_token=add_eos_token)
        told = prepare(options, tokenizer, None).messages
        assert any("the tokenizer's padding too: PEFT and transformers" in text for text in told) == add_eos_token
    assert not any("padding too" in text for text in classify(path, add_eos_token=True).messages)


@pytest.mark.parametrize("data_cache", [True, False])
def test_the_first_training_file_says_where_the_label_stands(tmp_path: Path, data_cache: bool) -> None:
    first = write(tmp_path / "1.tsv", [(label, text) for text, label in rows(12)])
    second = write(tmp_path / "2.tsv", [("pos", "same"), ("neg", "same")])  # by itself the other way round
    val = write(tmp_path / "val.tsv", [("neg", "other"), ("pos", "other")])
    for path in (second, val):
        with pytest.raises(DataError, match=r"all training rows have the label"):
            classify(path, data_cache=data_cache)
    options = DataOptions(
        task="classification", data_path=[str(first), str(second)], val_data_path=[str(val)], data_cache=data_cache
    )
    for from_cache in (False, data_cache):
        prepared = prepare(options, ByteTokenizer(), None)
        assert prepared.labels == ("neg", "pos") and prepared.from_cache == from_cache
        assert prepared.class_counts == (7, 7) and prepared.val_class_counts == (1, 1)
    # the same validation file beside training rows whose label comes second is read anew, not out of the cache
    write(first, rows(12))
    with pytest.raises(DataError, match="no training row has the label 'other'"):
        prepare(options.model_copy(update={"data_path": [str(first)]}), ByteTokenizer(), None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    expected = classify(write(tmp_path / "rows.tsv", rows(9, ("0", "1"))))
    path = tmp_path / f"rows{suffix}"
    objects = [{"text": text, "label": int(label)} for text, label in rows(9, ("0", "1"))]
    if suffix == ".csv":
        path.write_text("text,label\n" + "".join(f'"{o["text"]}",{o["label"]}\n' for o in objects))
    else:
        path.write_text(json.dumps(objects) if suffix == ".json" else "\n".join(map(json.dumps, objects)))
    assert pairs(classify(path)) == pairs(expected)


def test_sst2_has_all_its_rows(shared_data: Path) -> None:
    train, dev = (shared_data / "sst2" / f"{name}.tsv" for name in ("train", "dev"))
    prepared = classify(train, val_data_path=[str(dev)], skip_cleaning=["duplicates"])
    counted = [Counter(line[-1] for line in path.read_text().splitlines()) for path in (train, dev)]
    assert prepared.val is not None and (len(prepared.train), len(prepared.val)) == (6920, 872)
    assert prepared.labels == ("0", "1") and prepared.class_counts == (3310, 3610)
    assert prepared.val_class_counts == (428, 444)
    assert counted == [{"0": 3310, "1": 3610}, {"0": 428, "1": 444}]
    assert prepared.ledger.rows_in == 7792
