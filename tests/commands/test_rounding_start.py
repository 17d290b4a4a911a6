"""`finetune --init_lora_weights rounding_error`: nearer to the dense model from the first step on, and resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import Program

START: dict[str, Any] = {
    "init_lora_weights": "rounding_error", "quantize": "nf4", "lora_target_modules": "all-linear", "lora_dropout": 0,
    "max_steps": 4, "learning_rate": 0.001,
}  # fmt: skip
SAID = "the adapter starts at what quantizing took from the weights: "


def weights(program: Program) -> dict[str, torch.Tensor]:
    return load_file(program.folder / "out" / "adapter_model.safetensors")


def first_loss(program: Program) -> float:
    """Of the first step, which is taken before anything was learned."""
    line, *_ = (program.folder / "out" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(line)["train_loss"])


def test_with_all_the_rank_there_is_the_first_step_is_the_dense_models(program: Program) -> None:
    losses = {}
    for name, options in {
        "dense": {"quantize": None, "init_lora_weights": None},
        "nf4": {"init_lora_weights": None},
        "start": {},
    }.items():
        done = program("finetune", **{**START, "lora_r": 32, **options})
        assert done.code == 0, done.err
        assert (SAID in done.err) is (name == "start")
        losses[name] = first_loss(program)
        shutil.move(program.folder / "out", program.folder / name)
    assert abs(losses["start"] - losses["dense"]) < 1e-4 < 1e-2 < abs(losses["nf4"] - losses["dense"]), losses


def test_what_is_said_of_change_is_counted_from_the_start(program: Program) -> None:
    done = program("finetune", **{**START, "learning_rate": 1e-6, "max_steps": 1})
    assert done.code == 0, done.err
    report = done.result["method_report"]
    assert "what quantizing took from the weights, in 14 of 14 modules" in report["start"]
    assert all(kind["max"] < 1e-2 for kind in report["moved"].values())
    assert all(part["lora_B"]["start"] > 0.01 for part in report["norms"].values())
    assert all(bool(tensor.any()) for tensor in weights(program).values())


def test_a_resumed_run_is_the_same_run_and_fits_nothing_again(program: Program) -> None:
    assert program("finetune", **START).code == 0
    whole, report = weights(program), program("finetune", **{**START, "resume_from_checkpoint": "auto"}).result
    shutil.rmtree(program.folder / "out" / "checkpoint-3")
    shutil.rmtree(program.folder / "out" / "checkpoint-4")
    done = program("finetune", **{**START, "resume_from_checkpoint": "auto"})
    assert done.code == 0, done.err
    assert SAID not in done.err
    assert all(torch.equal(tensor, weights(program)[name]) for name, tensor in whole.items())
    assert done.result["method_report"] == report["method_report"]


def test_the_adapter_is_served_beside_the_base_that_it_makes_up_for(program: Program, tmp_path: Path) -> None:
    """generate quantizes the base as the run did; merging folds it into the weights that it was trained beside."""
    assert program("finetune", **START).code == 0
    done = program("generate", lora_weights=program.folder / "out")
    assert done.code == 0 and "the base is quantized as the adapter was trained on it" in done.err
    done = program("merge", lora_weights=program.folder / "out")
    assert done.code == 0, done.err
    assert done.result["merge_onto"] == "dequantized" and done.result["original_logit_difference"] is None
    assert "the adapter makes up for what quantizing took from the weights" in done.err
    program.refuses(
        "merge", 2, "merge_onto: the adapter makes up for what quantizing took", lora_weights=program.folder / "out",
        merge_onto="original", output_dir=tmp_path / "other",
    )  # fmt: skip


def test_a_quantized_folder_is_compared_with_what_it_was_made_of(program: Program, tmp_path: Path) -> None:
    dense = shutil.copytree(program.base, tmp_path / "dense")
    made = program("quantize", base_model=dense, scheme="int4", group_size=16, output_dir=tmp_path / "packed")
    assert made.code == 0, made.err
    options = {**START, "quantize": None, "base_model": tmp_path / "packed"}
    done = program("finetune", **options)
    assert done.code == 0 and SAID in done.err, done.err
    shutil.move(dense, tmp_path / "elsewhere")
    program.refuses("finetune", 2, str(dense), **{**options, "output_dir": tmp_path / "second"})
    program.refuses("check", 2, str(dense), **options)
    shutil.copytree(tmp_path / "elsewhere", dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    program.refuses(
        "finetune", 2, "init_lora_weights: needs the dense weights", "is another model by now",
        **{**options, "output_dir": tmp_path / "third"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": None}, "no linear that is adapted is quantized, expected default, add --quantize nf4"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"method": "dora"}, "--init_lora_weights: has no effect: method dora does not read it"),
    ],
)
def test_what_cannot_be_is_refused(program: Program, options: dict[str, Any], says: str) -> None:
    for command in ("check", "finetune"):
        program.refuses(command, 2, says, **{**START, **options})
