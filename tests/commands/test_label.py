"""A classifier through the commands: trained, asked, merged, asked again; and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alpaca_lora.adapters.base import METHODS, method_class
from alpaca_lora.adapters.record import read_record
from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.config import resolve
from tests.commands.conftest import Program, Write

TASK = {
    "task": "classification", "lora_target_modules": "all-linear", "max_steps": 12, "learning_rate": 0.02,
    "num_sample_answers": None,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"lora_r": 2}, "ia3": {"lora_target_modules": None, "lora_r": None}, "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3}, "freeze": {"train_last_layers": 1}, "full": {"learning_rate": 2e-3},
}  # fmt: skip
OWN = ("lora", "dora", "pissa", "adalora", "ia3")  # methods that read lora_target_modules
CALM, LOUD = "aaaa aaaa", "bbb bbbbb"


def options_of(method: str) -> dict[str, Any]:
    own = {"lora_target_modules": None, "lora_r": None} if method not in OWN else {}
    return {**TASK, **own, "method": method, **SMALL.get(method, {})}


@pytest.fixture
def files(program: Program) -> dict[str, Path]:
    """Texts of one letter or of the other: what even a tiny model tells apart."""
    train, val = program.folder / "train.tsv", program.folder / "val.tsv"
    train.write_text("".join(f"{letter * (3 + i % 5)} {letter * (1 + i)}\t{label}\n" for i in range(12)
                             for letter, label in (("a", "calm"), ("b", "loud"))))  # fmt: skip
    val.write_text("aaaaaaa\tcalm\nbbbbbbb\tloud\naa aa\tcalm\nbb bb\tloud\n")
    return {"data_path": train, "val_data_path": val}


def ask(program: Program, text: str, **options: Any) -> dict[str, Any]:
    done = program("generate", prompt=text, max_new_tokens=None, **options)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == done.result["label"]
    return done.result


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_labels_and_says_them(program: Program, files: dict[str, Path], method: str) -> None:
    done = program("finetune", **files, **options_of(method))
    assert done.code == 0, done.err
    figures = done.result
    assert sum(map(sum, figures["confusion"])) == 4 and figures["accuracy"] >= 0.5
    assert figures["method_report"]["method"] == method and figures["trained_parameters"] > 0
    folder = program.folder / "out"
    record = read_record(folder)
    assert record is not None and record.labels == ["calm", "loud"]
    assert record.metrics["accuracy"] == figures["accuracy"]
    assert "Confusion matrix" in (folder / "report.html").read_text()
    answer = ask(program, CALM, lora_weights=folder)
    assert sum(answer["probabilities"].values()) == pytest.approx(1) and set(answer["probabilities"]) == {
        "calm",
        "loud",
    }
    if not method_class(method).mergeable:
        program.refuses("merge", 2, "cannot be merged", lora_weights=folder)
        return
    merged = program("merge", lora_weights=folder)
    assert merged.code == 0, merged.err
    assert "a classifier of 'calm', 'loud': generate and transformers" in merged.err and "template" not in merged.err
    again = ask(program, CALM, base_model=program.folder / "merged")
    assert again["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)


def test_what_was_learned_is_told_apart(program: Program, files: dict[str, Path]) -> None:
    done = program("finetune", **files, **{**options_of("lora"), "max_steps": 40, "eval_steps": 10})
    assert done.code == 0 and done.result["accuracy"] == 1.0
    folder = program.folder / "out"
    assert [ask(program, text, lora_weights=folder)["label"] for text in (CALM, LOUD)] == ["calm", "loud"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("accuracy" in line for line in log) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a film\tgood\nanother film\tgood\n", "label"),  # one class
        ("a film\tgood\nanother film\t\n", "train.tsv:2: "),  # no label
        ("a film\nanother film\n", "train.tsv"),  # no column of labels
        ("", "train.tsv"),
    ],
)
def test_rows_that_cannot_be_learned_from(program: Program, write: Write, content: str, says: str) -> None:
    path = write(content, "train.tsv")
    program.refuses("finetune", 3, says, data_path=path, **options_of("lora"))


def test_a_label_that_training_does_not_have(program: Program, files: dict[str, Path], write: Write) -> None:
    val = write("aaaa\tcalm\nbbbb\tshrill\n", "other.tsv")
    options = {**options_of("lora"), **files, "val_data_path": val}
    program.refuses("finetune", 3, "other.tsv:2: ", "'shrill'", **options)


@pytest.mark.parametrize("given", [None, True, False])
def test_eos_ends_a_text_only_where_it_is_asked_for(given: bool | None) -> None:
    words = ["--base_model", "b", "--data_path", "d", "--task", "classification"]
    words += [] if given is None else ["--add_eos_token", str(given)]
    resolved = resolve(FinetuneConfig, words, "finetune")
    assert resolved.value.add_eos_token is bool(given)
    origin = "default of this method or task" if given is None else "flag"
    assert resolved.origins["add_eos_token"] == origin and f"add_eos_token: {bool(given)}".lower() in resolved.to_yaml()
    assert resolve(FinetuneConfig, words[:4], "finetune").value.add_eos_token
