"""What cannot be quantized, or not so: one message that names file, tensor or key, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.weights.huggingface import write_folder
from alpaca_lora.weights.safetensors_file import read_safetensors, write_safetensors
from tests.commands.conftest import Program, Write, edit_json, write_base
from tests.tiny import ByteTokenizer, tiny_model

UP = "model.layers.1.mlp.up_proj"
ROWS = {"calibration_data": "x"}
Copy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in int8. Read only."""
    folder = tmp_path_factory.mktemp("quantized")
    assert Program(tiny_base, folder / "none", folder)("quantize", scheme="int8").code == 0
    return folder / "quantized"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "--scheme nf4, for example"), ({"scheme": "nf5"}, "did you mean 'nf4'?"),
        ({"scheme": "nf4", "plan": "p.yml"}, "scheme: scheme or plan, expected one of both"),
        ({"scheme": "nf4", "group_size": 16}, "--group_size: has no effect: scheme nf4 does not read it"),
        ({"scheme": "int4", "block_size": 64}, "--block_size: has no effect: scheme int4 does not read it"),
        ({"scheme": "int8", "double_quant": True}, "--double_quant: has no effect: scheme int8 does not read it"),
        ({"scheme": "int8", "observer": "mse"}, "--observer: has no effect: scheme int8 does not read it"),
        ({"scheme": "nf4", "fp8_format": "e5m2"}, "--fp8_format: has no effect: scheme nf4 does not read it"),
        ({"scheme": "nf4", "bits": 4.5}, "--bits: has no effect: scheme nf4 does not read it"),
        ({"scheme": "nf4", "calibration_data": "x"}, "--calibration_data: has no effect: scheme nf4 needs no calib"),
        ({"scheme": "nf4", "calibration_tokens": 9}, "--calibration_tokens: has no effect: scheme nf4 needs no calib"),
        ({"plan": "p.yml", "symmetric": True}, "--symmetric: has no effect: scheme plan does not read it"),
        ({"scheme": "mixed", **ROWS}, "bits: mixed needs a budget, expected bits or max_perplexity_increase"),
        ({"scheme": "mixed", "bits": 4, "max_perplexity_increase": 0.01, **ROWS}, "bits: mixed needs a budget"),
        ({"scheme": "int8_static", "percentile": 99.9, **ROWS}, "--percentile: has no effect: observer is not perc"),
        ({"scheme": "int4", "group_size": 7}, "group_size: 7 is not possible, expected an integer >= 8"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(program: Program, asked: dict[str, Any], says: str) -> None:
    done = program("quantize", **asked)
    assert done.code == 2 and says in done.result["error"]["message"].replace("--scheme: ", "scheme: "), done.err
    assert not (program.folder / "quantized").exists()


NEED_ROWS: list[dict[str, Any]] = [
    {"scheme": "int8_static"}, {"scheme": "int4", "rounding": "gptq"}, {"scheme": "mixed", "bits": 5}
]  # fmt: skip


@pytest.mark.parametrize("asked", NEED_ROWS)
def test_rows_that_are_missing(program: Program, write: Write, asked: dict[str, Any]) -> None:
    says = (
        "calibration_data",
        "missing: this is made by running the model on rows",
        "expected a text file, or any dat",
    )
    program.refuses("quantize", 2, *says, **asked)
    nowhere = "calibration_data: there is no file 'nowhere.txt', expected a text or data file"
    program.refuses("quantize", 2, nowhere, **asked, calibration_data="nowhere.txt")
    short = write("a few words\n", "short.txt")
    program.refuses("quantize", 2, f"calibration_data: {short} holds ", "expected at least 128", **asked,
                    calibration_data=short)  # fmt: skip
    program.refuses("quantize", 2, "calibration_tokens: 100 tokens are too few, expected at least 128", **asked,
                    calibration_data=program.rows, calibration_tokens=100)  # fmt: skip
    broken = write('{"instruction": "a", "output": 3}\n', "broken.jsonl")
    program.refuses("quantize", 3, f"{broken}:1: ", **asked, calibration_data=broken)


def test_rows_that_a_plan_needs(program: Program, write: Write) -> None:
    plan = write("plan:\n- {modules: up_proj, scheme: int8_static}\n")
    says = "calibration_data: missing: scheme int8_static of model.layers.0.mlp.up_proj is made by running the model on"
    program.refuses("quantize", 2, says, plan=plan)
    says = "quantization_plan: model.layers.0.mlp.up_proj: scheme int8_static is made by running the model on rows"
    program.refuses("generate", 2, says, "`alpaca-lora quantize --calibration_data`", quantization_plan=plan)


def test_a_group_size_that_does_not_divide(program: Program, write: Write) -> None:
    says = "model.layers.0.mlp.down_proj: 32 does not divide the 48 inputs of a linear of 32 x 48, nearest: 16, 24, 48"
    program.refuses("quantize", 2, f"--group_size: {says}", scheme="int4", group_size=32)
    plan = write("plan:\n- {modules: down_proj, scheme: int4, group_size: 32}\n")
    for command in ("quantize", "generate", "finetune", "check"):
        key = "plan" if command == "quantize" else "quantization_plan"
        asked: dict[str, Any] = {key: plan}
        program.refuses(command, 2, f"{plan}:2: plan[0].group_size: {says}", **asked)


def test_plans_that_name_nothing(program: Program, write: Write) -> None:
    for content, says in (
        ("plan: []\n", ": plan: names no layer, expected a list of entries"),
        ("plan:\n- {modules: q_porj, scheme: nf4}\n", ":2: plan[0].modules: 'q_porj' names no linear of this model"),
        ("plan:\n- {modules: all-linear, scheme: dense}\n", ": plan: leaves every layer dense"),
    ):
        plan = write(content)
        program.refuses("quantize", 2, f"{plan}{says}", plan=plan)
        program.refuses("finetune", 2, f"{plan}{says}", quantization_plan=plan)
    program.refuses(
        "quantize", 2, "--plan: there is no file 'nowhere.yml', expected a YAML or JSON file", plan="nowhere.yml"
    )
    program.refuses("generate", 2, "--quantization_plan: there is no file 'no'", quantization_plan="no")
    program.refuses("generate", 2, "quantize: stands beside quantization_plan", quantize="nf4", quantization_plan="p")


def test_what_is_quantized_already(program: Program, quantized: Path, tiny_base: Path, copied: Copy) -> None:
    says = f"base_model: {quantized} is quantized already, expected a dense model, give the model that it was made of"
    program.refuses("quantize", 2, says, str(tiny_base), base_model=quantized, scheme="nf4")
    for command in ("generate", "finetune", "check"):
        says = f"--quantize: {quantized} is quantized already, leave it out, or give the dense model"
        program.refuses(command, 2, says, base_model=quantized, quantize="nf4")
    says = f"quantization_aware: {quantized} is quantized already, expected a dense base"
    program.refuses("finetune", 2, says, base_model=quantized, quantization_aware="int4")
    # somebody else's
    other = copied(tiny_base)
    edit_json(other / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    says = "config.json: quantization_config: quantized weights in this format are not supported, use the unquantized"
    program.refuses("quantize", 3, says, base_model=other, scheme="nf4")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"method": "full"}, "method"), ({"method": "freeze"}, "train_last_layers"),
        ({"method": "freeze", "trained_modules": "up_proj"}, "trained_modules"),
        ({"modules_to_save": "up_proj"}, "modules_to_save"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_wholly(program: Program, quantized: Path, options: dict[str, Any], key: str) -> None:
    asked = {"lora_r": None} if "method" in options else {}
    bases: list[dict[str, Any]] = [{"base_model": quantized}, {"quantize": "int8"}]
    for base in bases:
        says = f"{key}: model.layers."
        done = program.refuses("finetune", 2, "is quantized: its weights cannot be trained, expected dense modules",
                               **options, **asked, **base)  # fmt: skip
        assert says in done.result["error"]["message"]


def test_weights_that_are_not_finite(program: Program) -> None:
    model = tiny_model()
    weight: Any = model.get_submodule(UP).weight
    weight.data[3, 4] = float("inf")
    path = program.folder / "infinite"
    write_folder(path, model.state_dict().items(), model.config.to_hf(), tokenizer_saver=ByteTokenizer().save)
    says = f"{path / 'model.safetensors'}: {UP}.weight: weights that are NaN or infinite"
    program.refuses("quantize", 5, says, base_model=path, scheme="nf4")
    program.refuses("generate", 5, says, base_model=path, quantize="int4")


def test_scales_that_do_not_fit_their_codes(program: Program, quantized: Path, copied: Copy) -> None:
    path = copied(quantized)
    file = path / "model.safetensors"
    tensors = read_safetensors(file)
    file.unlink()
    write_safetensors(file, {**tensors, f"{UP}.scales": torch.ones(7)}, {"format": "pt"})
    says = (
        f"{file}: {UP}.scales: has shape 7, which does not fit its linear of 48 x 32 weights, expected 48, quantize the"
    )
    program.refuses("generate", 3, says, base_model=path)
    program.refuses("finetune", 3, says, base_model=path)


def test_a_record_that_is_gone(program: Program, quantized: Path, copied: Copy) -> None:
    path = copied(quantized)
    (path / "quantization.json").unlink()
    program.refuses("generate", 3, "14 tensors are missing: model.layers.0", ".weight", base_model=path)


def test_adapters_that_cannot_be_folded_in(program: Program, trained: Path, copied: Copy) -> None:
    program.refuses("quantize", 2, "no such folder", scheme="nf4", lora_weights="nowhere")
    prefix = program.folder / "prefix"
    assert program("finetune", method="prefix", lora_r=None, output_dir=prefix).code == 0
    program.refuses("quantize", 2, "is of method prefix, which is no change of any weight", scheme="nf4",
                    lora_weights=prefix)  # fmt: skip
    other = write_base(program.folder / "other", tie_word_embeddings=True)
    program.refuses(
        "quantize", 2, "trained on another base model", scheme="nf4", lora_weights=trained, base_model=other
    )
    on_int8 = program.folder / "on_int8"
    assert program("finetune", quantize="int8", output_dir=on_int8).code == 0
    program.refuses("quantize", 2, "quantized as it was then or not at all", scheme="int8", lora_weights=on_int8)


def test_a_plan_of_a_record_that_does_not_fit(program: Program, trained: Path, copied: Copy) -> None:
    folder = copied(trained)
    record = json.loads((folder / "alpaca_lora.json").read_text())
    record["base_plan"] = [{"modules": ["model.layers.9.mlp.up_proj"], "scheme": "int8"}]
    (folder / "alpaca_lora.json").write_text(json.dumps(record))
    says = "alpaca_lora.json: plan[0].modules: 'model.layers.9.mlp.up_proj' names no linear of this model"
    program.refuses("generate", 2, says, lora_weights=folder)
    edit_json(folder / "alpaca_lora.json", base_plan="all")
    program.refuses(
        "generate", 3, "alpaca_lora.json: base_plan: wrong value 'all', expected list of dict", lora_weights=folder
    )


def test_a_folder_that_is_in_the_way(program: Program) -> None:
    (program.folder / "quantized").mkdir()
    (program.folder / "quantized" / "mine.txt").write_text("mine")
    program.refuses("quantize", 2, "exists already, give another name, or remove it first", scheme="nf4")
