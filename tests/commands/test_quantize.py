"""`alpaca-lora quantize` and `--quantize` through the command line: what is written is served, tuned and told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.device import Compute
from alpaca_lora.models.load import Base, packed_linears
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import load_base
from alpaca_lora.quantization.plan import Plan
from tests.adapters.conftest import our_logits
from tests.commands.conftest import Program

COMPUTE = Compute(torch.device("cpu"), torch.float32, 1, "test")
SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun is up again.\n"


def loaded(path: Path, **asked: Any) -> Base:
    return load_base(str(path), COMPUTE, **asked)


def codes(base: Base) -> dict[str, torch.Tensor]:
    return {name: linear.get_buffer("codes") for name, linear in packed_linears(base.model)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = (torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)) for name, tensor in one.items())
    return one.keys() == other.keys() and all(same)


@pytest.fixture
def text(program: Program) -> Path:
    path = program.folder / "rows.txt"
    path.write_text(SENTENCE * 12)
    return path


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "fp8", "int8", "int4", "int8_dynamic"])
def test_the_folder_is_the_base_that_quantize_makes_while_loading(program: Program, scheme: str) -> None:
    done = program("quantize", scheme=scheme, dtype="float32")
    assert done.code == 0, done.err
    folder = Path(done.result["output_dir"])
    on_load = loaded(program.base, quantize=scheme)
    assert done.result["fingerprint"] == on_load.fingerprint == loaded(folder).fingerprint
    assert torch.equal(our_logits(loaded(folder).model), our_logits(on_load.model))
    assert done.result["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert done.result["dense_bytes"] == 4 * on_load.model.num_parameters()
    assert 0 < done.result["mean_error"] <= done.result["largest_error"] < 0.3
    assert done.result["bits_per_weight"] == pytest.approx(
        Plan.of(on_load.model).bits_per_weight(shapes(on_load)), 1e-3
    )
    assert "quantization plan" in done.err and f"{scheme}" in done.err and "largest errors" in done.err
    said = [program(command, **asked).result["text"] for command, asked in (
        ("generate", {"base_model": folder}), ("generate", {"quantize": scheme})
    )]  # fmt: skip
    assert said[0] == said[1]


def shapes(base: Base) -> dict[str, tuple[int, int]]:
    return {name: (linear.out_features, linear.in_features) for name, linear in packed_linears(base.model)}


def test_what_stands_in_the_folder(program: Program) -> None:
    folder = Path(program("quantize", scheme="int8").result["output_dir"])
    content = json.loads((folder / "quantization.json").read_text())
    assert (
        content["base_model"] == str(program.base) and content["base_fingerprint"] == loaded(program.base).fingerprint
    )
    assert content["statistics"]["relative_errors_of"] == "weight" and len(content["statistics"]["largest"]) == 10
    errors = [error for _, error in content["statistics"]["largest"]]
    assert errors == sorted(errors, reverse=True)
    assert {entry["scheme"] for entry in content["plan"]} == {"int8"} and len(content["plan"]) == 1
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted({257, *loaded(program.base).tokenizer.stop_ids})
    assert loaded(folder).tokenizer.stop_ids == loaded(program.base).tokenizer.stop_ids


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [
        ({"scheme": "int8_static"}, "int8_static"), ({"scheme": "int8_static", "observer": "minmax"}, "int8_static"),
        ({"scheme": "int4", "rounding": "gptq", "group_size": 16}, "int4"),
        ({"scheme": "int4", "rounding": "awq", "group_size": 16}, "int4"),
        ({"scheme": "nf4", "rounding": "gptq"}, "nf4"),
    ],
)  # fmt: skip
def test_over_rows(program: Program, text: Path, asked: dict[str, Any], scheme: str) -> None:
    """From text and from rows; another text is another base."""
    made = [
        program("quantize", **asked, calibration_data=data, calibration_tokens=500, output_dir=program.folder / name)
        for name, data in (("a", text), ("b", text), ("c", program.rows))
    ]
    assert [done.code for done in made] == [0, 0, 0], made[0].err
    assert made[0].result["calibration_tokens"] == 500
    prints = [done.result["fingerprint"] for done in made]
    assert prints[0] == prints[1] != prints[2]
    base = loaded(program.folder / "a")
    assert {linear.scheme.name for _, linear in packed_linears(base.model)} == {scheme}  # pyright: ignore
    assert "of the output's norm" in made[0].err
    content = json.loads((program.folder / "a" / "quantization.json").read_text())
    assert len(content["calibration_sha256"]) == 64 and content["rounding"] == asked.get("rounding", "nearest")


def test_mixed_within_a_budget_of_bits(program: Program, text: Path) -> None:
    done = program("quantize", scheme="mixed", bits=7, calibration_data=text, calibration_tokens=300)
    assert done.code == 0, done.err
    assert 5 < done.result["bits_per_weight"] <= 7
    folder = Path(done.result["output_dir"])
    assert len({type(scheme) for scheme in Plan.of(loaded(folder).model).schemes.values()}) > 1
    # its quantization.json is a plan, and makes the same weights of the same model
    again = program("quantize", plan=folder / "quantization.json", output_dir=program.folder / "again")
    assert again.result["fingerprint"] == done.result["fingerprint"]
    assert equal(codes(loaded(folder)), codes(loaded(program.folder / "again")))


def test_a_plan_by_hand(program: Program) -> None:
    plan = program.folder / "plan.yml"
    plan.write_text("plan:\n- {modules: down_proj, scheme: int8}\n- {modules: all-linear, scheme: nf4}\n")
    done = program("quantize", plan=plan)
    assert done.code == 0, done.err
    schemes = Plan.of(loaded(Path(done.result["output_dir"])).model).schemes
    assert {name.rpartition(".")[2] for name, one in schemes.items() if one.name == "int8"} == {"down_proj"}
    assert loaded(Path(done.result["output_dir"])).fingerprint == done.result["fingerprint"]


def test_rows_may_be_needed_by_a_plan(program: Program, text: Path) -> None:
    plan = program.folder / "plan.yml"
    plan.write_text("plan:\n- {modules: down_proj, scheme: int8_static}\n- {modules: all-linear, scheme: int8}\n")
    done = program("quantize", plan=plan, calibration_data=text, calibration_tokens=300)
    assert done.code == 0, done.err


def test_an_adapter_is_folded_in_first(program: Program, trained: Path) -> None:
    done = program("quantize", scheme="int8", lora_weights=trained)
    assert done.code == 0, done.err
    folder = Path(done.result["output_dir"])
    dense = loaded(program.base)
    adapter, _ = load_adapter(trained, dense.model, dense.fingerprint)
    adapter.merge()
    found = loaded(folder)
    for name, linear in packed_linears(found.model):
        assert isinstance(linear, QuantizedLinear)
        weight: Any = dense.model.get_submodule(name).weight
        assert torch.equal(linear.get_buffer("codes"), linear.scheme.quantize(weight.detach(), name=name)["codes"])
    plain = program("quantize", scheme="int8", output_dir=program.folder / "plain")
    assert plain.result["fingerprint"] != done.result["fingerprint"]
    assert not equal(codes(found), codes(loaded(program.folder / "plain")))
    # the template it was trained with is in the folder, and generate takes it from there
    assert (folder / "alpaca_lora.json").is_file() and not (program.folder / "plain" / "alpaca_lora.json").exists()


@pytest.mark.parametrize("method", ["dora", "pissa", "adalora", "ia3", "freeze", "bitfit", "full"])
def test_adapters_of_every_kind_are_folded_in(program: Program, method: str) -> None:
    rank = {} if method in ("dora", "pissa", "adalora") else {"lora_r": None}
    learning_rate = {"learning_rate": 0.5 if method == "ia3" else 0.01}
    assert program("finetune", method=method, **rank, **learning_rate).code == 0
    done = program("quantize", scheme="int8", lora_weights=program.folder / "out", dtype="float32")
    assert done.code == 0, done.err
    assert program("merge", lora_weights=program.folder / "out", dtype="float32").code == 0
    merged, found = loaded(program.folder / "merged", quantize="int8"), loaded(program.folder / "quantized")
    assert equal(codes(merged), codes(found))
    assert torch.equal(our_logits(merged.model), our_logits(found.model))


def test_an_adapter_outside_of_the_plan_is_merged(program: Program, trained: Path, text: Path) -> None:
    """Where linears that it changes stay dense, and where rows are needed."""
    plan = program.folder / "plan.yml"
    plan.write_text("plan:\n- {modules: [k_proj, q_proj], scheme: int8}\n")  # the adapter is on q and v
    assert program("quantize", plan=plan, lora_weights=trained, dtype="float32").code == 0
    assert program("merge", lora_weights=trained, dtype="float32").code == 0
    found = loaded(program.folder / "quantized")
    expected = loaded(program.folder / "merged", plan_of=lambda model: Plan.from_file(model, plan))
    assert torch.equal(our_logits(found.model), our_logits(expected.model))
    for name, more in (("static", {"scheme": "int8_static"}), ("mixed", {"scheme": "mixed", "bits": 7})):
        more: dict[str, Any] = {**more, "calibration_data": text, "calibration_tokens": 300, "dtype": "float32"}
        made = [
            program("quantize", **more, output_dir=program.folder / f"{name}-folded", lora_weights=trained),
            program("quantize", **more, output_dir=program.folder / name, base_model=program.folder / "merged"),
        ]
        assert [done.code for done in made] == [0, 0], made[0].err
        assert made[0].result["mean_error"] == pytest.approx(made[1].result["mean_error"], rel=1e-3)
        assert made[0].result["bits_per_weight"] == made[1].result["bits_per_weight"]


def test_a_quantization_aware_adapter_is_folded_as_it_was_trained(program: Program) -> None:
    tuned = program("finetune", quantization_aware="int4", group_size=16, dtype="bfloat16")
    assert tuned.code == 0, tuned.err
    for scheme, warned in (("int4", False), ("int8", True)):
        group = {"group_size": 16} if scheme == "int4" else {}
        output = program.folder / scheme
        done = program("quantize", scheme=scheme, **group, lora_weights=program.folder / "out", output_dir=output)
        assert done.code == 0 and ("was trained for int4" in done.err) is warned, done.err
    base = load_base(str(program.base), Compute(torch.device("cpu"), torch.bfloat16, 1, "test"))
    adapter, _ = load_adapter(program.folder / "out", base.model, base.fingerprint)
    found = loaded(program.folder / "int4")
    for name, layer in adapter.layers.items():  # pyright: ignore[reportAttributeAccessIssue]
        linear: Any = found.model.get_submodule(name)
        parts = linear.scheme.quantize(layer.merged_weight(), name=name)
        assert all(torch.equal(linear.get_buffer(part), tensor) for part, tensor in parts.items())


def test_a_classifier_keeps_its_labels(program: Program) -> None:
    rows = program.folder / "rows.tsv"
    rows.write_text("".join(f"{'good' if i % 2 else 'bad'} film {i}\t{'yes' if i % 2 else 'no'}\n" for i in range(16)))
    assert program("finetune", task="classification", data_path=rows, num_sample_answers=None).code == 0
    assert program("merge", lora_weights=program.folder / "out").code == 0
    done = program("quantize", base_model=program.folder / "merged", scheme="int8")
    assert done.code == 0, done.err
    answers = [
        program("generate", base_model=program.folder / name, prompt="good film").result
        for name in ("merged", "quantized")
    ]
    assert sorted(answers[1]["probabilities"]) == ["no", "yes"]
    for label, share in answers[0]["probabilities"].items():
        assert answers[1]["probabilities"][label] == pytest.approx(share, abs=0.05)


def test_ctrl_c_leaves_nothing_behind(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(program.folder))

    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuantizedLinear, "relative_error", interrupt)
    assert program("quantize", scheme="int8").code == 130
    monkeypatch.undo()
    monkeypatch.setattr("alpaca_lora.weights.huggingface._write_shards", interrupt)
    assert program("quantize", scheme="int8").code == 130
    assert sorted(os.listdir(program.folder)) == before


# ---- tuning and answering on a quantized base


def test_an_adapter_goes_with_every_way_to_the_same_base(program: Program) -> None:
    assert program("quantize", scheme="int8", dtype="float32").code == 0
    tuned = program("finetune", quantize="int8")
    assert tuned.code == 0 and "quantized: int8, " in tuned.err, tuned.err
    out = program.folder / "out"
    ways: list[dict[str, Any]] = [{}, {"quantize": "int8"}, {"base_model": program.folder / "quantized"}]
    answers = [program("generate", lora_weights=out, **way) for way in ways]
    assert [answer.code for answer in answers] == [0, 0, 0], answers[2].err
    assert len({answer.result["text"] for answer in answers}) == 1
    assert "the base is quantized as the adapter was trained on it" in answers[0].err
    assert program("finetune", base_model=program.folder / "quantized", fresh="true").code == 0
    assert program("generate", lora_weights=out, quantize="int8").code == 0


def test_the_adapter_knows_the_plan_of_its_base(program: Program) -> None:
    plan = program.folder / "plan.yml"
    plan.write_text("plan:\n- {modules: up_proj, scheme: int8}\n")
    assert program("finetune", quantization_plan=plan).code == 0
    plan.unlink()
    assert program("generate", lora_weights=program.folder / "out").code == 0
    record = json.loads((program.folder / "out" / "alpaca_lora.json").read_text())
    assert [entry["scheme"] for entry in record["base_plan"]] == ["int8"]


def test_another_form_of_the_base_is_refused(program: Program, trained: Path) -> None:
    says = ("trained on another base model", "quantized as it was then or not at all")
    program.refuses("generate", 2, *says, lora_weights=trained, quantize="int8")
    assert program("finetune", quantize="int8").code == 0
    program.refuses("generate", 2, *says, lora_weights=program.folder / "out", quantize="nf4")


def test_a_resumed_run_keeps_the_form_of_its_base(program: Program) -> None:
    assert program("finetune", quantize="nf4", max_steps=1).code == 0
    program.refuses("finetune", 2, "quantize", quantize="int8", resume_from_checkpoint="auto")
