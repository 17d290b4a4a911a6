"""From `finetune --quantization_aware` to the folder that `quantize` writes: no bit is lost on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.adapters.record import read_record
from alpaca_lora.device import DTYPES, pick_compute
from alpaca_lora.models.attention import Packed
from alpaca_lora.quantization.load import load_base
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.qat import fake_quantize
from tests.commands.conftest import Program, snapshot

AWARE: dict[str, Any] = {
    "quantization_aware": "int4",
    "group_size": 16,
    "lora_target_modules": "q_proj,v_proj,down_proj",
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"method": "dora"}, "pissa": {"method": "pissa"},
    "full": {"method": "full", "lora_r": None, "lora_target_modules": None, "learning_rate": 0.003},
}  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids_T = torch.arange(45) * 5 % 250
    return model.logits(model(ids_T, torch.arange(45), Packed((45,))))


def as_trained(program: Program, dtype: str, *, quantized: bool = True) -> torch.Tensor:
    """Logits of the model that training evaluated: the dense base, the adapter, quantized as one."""
    compute = replace(pick_compute("cpu", dtype, 1), dtype=DTYPES[dtype])
    base = load_base(str(program.base), compute)
    plan = Plan.uniform(base.model, "int4", {"group_size": 16})
    load_adapter(program.folder / "out", base.model, base.fingerprint, trainable=True)
    if quantized:
        fake_quantize(base.model, plan)
    return logits(base.model)


@pytest.mark.parametrize(("method", "dtype"), [*((m, "float32") for m in METHODS), ("lora", "bfloat16")])
def test_the_quantized_folder_is_the_model_that_was_trained(program: Program, method: str, dtype: str) -> None:
    done = program("finetune", **{**AWARE, "dtype": dtype, "max_steps": 4, "val_set_size": 3, **METHODS[method]})
    assert done.code == 0, done.err
    assert "quantization-aware: trained for int4" in done.err
    assert done.result["val_loss"] > 0
    record = read_record(program.folder / "out")
    assert record is not None
    assert record.quantization_aware == {"scheme": "int4", "settings": {"group_size": 16}, "dtype": dtype}
    done = program("quantize", lora_weights=program.folder / "out", scheme="int4", group_size=16, dtype=dtype)
    assert done.code == 0, done.err
    compute = replace(pick_compute("cpu", dtype, 1), dtype=DTYPES[dtype])
    served = load_base(str(program.folder / "quantized"), compute)
    assert torch.equal(logits(served.model), as_trained(program, dtype))
    assert not torch.equal(logits(served.model), as_trained(program, dtype, quantized=False))


def test_generate_answers_from_the_weights_that_were_trained(program: Program) -> None:
    trained = program("finetune", **{**AWARE, "max_steps": 4, "learning_rate": 0.05})
    assert trained.code == 0, trained.err
    asked: dict[str, Any] = {"prompt": "Say the number 3", "max_new_tokens": 12, "temperature": 0}
    served = program("generate", lora_weights=program.folder / "out", **asked)
    assert served.code == 0 and "folded in and quantized, as it was trained" in served.err
    made = program("quantize", lora_weights=program.folder / "out", scheme="int4", group_size=16, dtype="float32")
    assert made.code == 0, made.err
    folder = program("generate", base_model=program.folder / "quantized", **asked)
    assert served.result["text"] == folder.result["text"] != ""


def test_another_form_is_said(program: Program) -> None:
    program("finetune", **AWARE)
    done = program("quantize", lora_weights=program.folder / "out", scheme="int8")
    assert done.code == 0 and "warning: the adapter was trained for int4" in done.err


def test_a_run_is_taken_up_bit_for_bit_and_not_as_another(program: Program) -> None:
    whole = program("finetune", **AWARE, max_steps=3)
    assert whole.code == 0, whole.err
    checkpoint = program.folder / "out" / "checkpoint-1"
    again = program(
        "finetune", **AWARE, max_steps=3, resume_from_checkpoint=checkpoint, output_dir=program.folder / "b"
    )
    assert again.code == 0, again.err
    weights = "adapter_model.safetensors"
    assert snapshot(program.folder / "b" / weights) == snapshot(program.folder / "out" / weights)
    program.refuses(
        "finetune", 2, "group_size: 16 in the checkpoint, 8 now", **{**AWARE, "group_size": 8}, max_steps=3,
        resume_from_checkpoint=checkpoint, output_dir=program.folder / "c",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "nf4"}, ["quantization_aware", "stands beside quantize", "expected a dense base"]),
        ({"lora_dropout": 0.1}, ["lora_dropout", "is 0.1 beside quantization_aware"]),
        ({"method": "ia3", "lora_r": None}, ["quantization_aware", "cannot learn through a quantized weight"]),
        (
            {"method": "bitfit", "lora_r": None, "lora_target_modules": None},
            ["quantization_aware", "no weight is trained that would be quantized", "--quantize"],
        ),
        ({"group_size": 24}, ["group_size", "24 does not divide the 32 inputs"]),
        ({"block_size": 64}, ["--block_size", "scheme int4 does not read it"]),
        ({"quantization_aware": None}, ["--group_size", "quantization_aware is none"]),
        (
            {"quantization_aware": "int8_static", "group_size": None},
            ["quantization_aware", "'int8_static' is not possible"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(program: Program, options: dict[str, Any], says: list[str]) -> None:
    program.refuses("finetune", 2, *says, **{**AWARE, **options})


def test_a_quantized_base_is_refused(program: Program) -> None:
    assert program("quantize", scheme="int8").code == 0
    folder = program.folder / "quantized"
    program.refuses("finetune", 2, "quantization_aware", "is quantized already", base_model=folder, **AWARE)


def test_the_probe_of_another_form_is_not_taken(program: Program) -> None:
    """Memory and speed differ between plain and quantization-aware runs of the same adapter."""
    for options in ({**AWARE, "quantization_aware": None, "group_size": None, "lora_dropout": 0}, AWARE):
        assert program("finetune", **options, output_dir=program.folder / str(len(options))).code == 0
    assert len(list(Path(program.folder / "home" / "probes").iterdir())) == 2
