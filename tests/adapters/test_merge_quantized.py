"""Merging an adapter that was trained on a quantized base: into what it saw, or into the dense weights behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.merge import FLOAT32_BOUND, merge_into_folder, storage_dtype
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.cli import main
from alpaca_lora.errors import AdapterError
from alpaca_lora.models.linear import dense_state
from alpaca_lora.models.load import Base, packed_linears
from alpaca_lora.models.load import load_base as load_dense
from alpaca_lora.quantization.load import load_base
from alpaca_lora.quantization.plan import Plan
from tests.adapters.conftest import our_logits, train_a_little
from tests.adapters.test_merge import COMPUTE, base_folder

Say = pytest.CaptureFixture[str]
ON_LOAD = ("nf4", "fp4", "fp8", "int8", "int4")


def trained_on(folder: Path, scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Base, Lora]:
    """folder/base and folder/adapter, trained on the base in ``scheme``."""
    base = load_base(str(base_folder(folder / "base", dtype)), COMPUTE, quantize=scheme)
    plan = Plan.of(base.model)
    adapter = Lora.attach(
        base.model, AdapterOptions(lora_r=4, lora_alpha=8, lora_target_modules=["all-linear"]), seed=0
    )
    train_a_little(adapter)
    record = AdapterRecord(str(folder / "base"), base.fingerprint, base_plan=plan.to_entries())
    save_adapter(folder / "adapter", adapter, record)
    return base, adapter


def merge(folder: Path, capsys: Say, *flags: str, base: str = "base", code: int = 0) -> dict[str, Any]:
    words = ["--base_model", str(folder / base), "--lora_weights", str(folder / "adapter"), "--num_threads", "1"]
    assert main(["merge", *words, "--output_dir", str(folder / "merged"), *flags, "--json"]) == code
    said = capsys.readouterr()
    return {**json.loads(said.out.splitlines()[-1]), "said": " ".join(said.err.split())}


@pytest.mark.parametrize("scheme", ON_LOAD)
def test_merged_is_what_was_trained(tmp_path: Path, capsys: Say, scheme: str) -> None:
    base, adapter = trained_on(tmp_path, scheme)
    wanted = our_logits(base.model)
    weights = {name: layer.merged_weight() for name, layer in adapter.layers.items()}
    done = merge(tmp_path, capsys)
    assert done["merge_onto"] == "dequantized" and done["merge_dtype"] == "float32"
    merged = load_dense(str(tmp_path / "merged"), COMPUTE)
    assert packed_linears(merged.model) == []
    assert (our_logits(merged.model) - wanted).abs().max() < FLOAT32_BOUND
    for name, weight in weights.items():
        assert torch.equal(merged.model.get_submodule(name).weight, weight)  # pyright: ignore
    # the other way is told, with the reason, and is another model
    assert done["original_max_logit_difference"] > 10 * FLOAT32_BOUND > 10 * done["max_logit_difference"]
    assert "because the adapter was trained beside the quantized ones" in done["said"]
    assert "the base is quantized as the adapter was trained on it" in done["said"]


def test_merged_onto_the_original(tmp_path: Path, capsys: Say) -> None:
    base, adapter = trained_on(tmp_path, "nf4")
    trained = our_logits(base.model)
    updates = {n: layer.merged_weight() - layer.base.dense_weight() for n, layer in adapter.layers.items()}
    done = merge(tmp_path, capsys, "--merge_onto", "original")
    dense, merged = (load_dense(str(tmp_path / name), COMPUTE) for name in ("base", "merged"))
    for name, update in updates.items():
        found, start = (one.model.get_submodule(name).weight for one in (merged, dense))
        torch.testing.assert_close(found, start + update, rtol=0, atol=1e-6)  # pyright: ignore
    assert done["merge_onto"] == "original" and done["max_logit_difference"] < FLOAT32_BOUND
    difference = (our_logits(merged.model) - trained).abs()
    assert difference.mean() > 10 * FLOAT32_BOUND
    # on other texts than these, of the same size
    assert done["original_logit_difference"] == pytest.approx(float(difference.mean()), rel=0.5)


def test_bfloat16_is_kept_where_the_original_has_it(tmp_path: Path, capsys: Say) -> None:
    trained_on(tmp_path, "int8", torch.bfloat16)
    assert merge(tmp_path, capsys, "--merge_onto", "original")["merge_dtype"] == "bfloat16"


def test_a_dequantized_base_is_no_bfloat16(tmp_path: Path) -> None:
    folder = str(base_folder(tmp_path / "base", torch.bfloat16))
    assert storage_dtype(load_base(folder, COMPUTE).model) == torch.bfloat16
    assert storage_dtype(load_base(folder, COMPUTE, quantize="int8").model) == torch.float32


def test_a_quantized_folder_as_base(tmp_path: Path, capsys: Say) -> None:
    trained_on(tmp_path, "int8")
    words = ["quantize", "--base_model", str(tmp_path / "base"), "--scheme", "int8", "--dtype", "float32"]
    assert main([*words, "--output_dir", str(tmp_path / "int8"), "--num_threads", "1"]) == 0
    capsys.readouterr()
    done = merge(tmp_path, capsys, base="int8")
    assert done["merge_onto"] == "dequantized" and done["original_logit_difference"] > 0
    # where the dense model is gone, or is another by now, only what asks for it is refused
    base_folder(tmp_path / "other", tie_word_embeddings=True)
    for there in (False, True):
        (tmp_path / "base").rename(tmp_path / f"gone{there}")
        if there:
            (tmp_path / "other").rename(tmp_path / "base")
        _remove(tmp_path / "merged")
        done = merge(tmp_path, capsys, base="int8")
        assert done["original_logit_difference"] is None and "they are not at hand" in done["said"]
        _remove(tmp_path / "merged")
        error = merge(tmp_path, capsys, "--merge_onto", "original", base="int8", code=2)["error"]["message"]
        assert ("is another model by now" if there else "there is no file or folder") in error
        if not there:
            (tmp_path / "goneFalse").rename(tmp_path / "base")


def _remove(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()
    if folder.exists():
        folder.rmdir()


def test_another_form_of_the_base_is_refused(tmp_path: Path, capsys: Say) -> None:
    trained_on(tmp_path, "int8")
    error = merge(tmp_path, capsys, "--quantize", "nf4", code=2)["error"]["message"]
    assert "trained on another base model" in error
    assert not (tmp_path / "merged").exists()


def test_a_dense_base_has_no_other(tmp_path: Path, capsys: Say) -> None:
    base = load_dense(str(base_folder(tmp_path / "base")), COMPUTE)
    adapter = Lora.attach(base.model, AdapterOptions(lora_r=4), seed=0)
    train_a_little(adapter)
    save_adapter(tmp_path / "adapter", adapter, AdapterRecord("base", base.fingerprint))
    error = merge(tmp_path, capsys, "--merge_onto", "original", code=2)["error"]["message"]
    assert error == "--merge_onto: the base is dense, there is no other, leave it out"


def test_in_place_it_cannot_be_merged(tmp_path: Path) -> None:
    base, adapter = trained_on(tmp_path, "int8")
    before = our_logits(base.model)
    with pytest.raises(
        AdapterError, match=r"q_proj: holds no dense weight to merge into, use the merge command, which"
    ):
        adapter.merge()
    assert torch.equal(our_logits(base.model), before)
    adapter.remove()
    assert not torch.equal(our_logits(base.model), before)


def test_state_is_complete_and_dense(tmp_path: Path) -> None:
    base = load_base(str(base_folder(tmp_path / "base")), COMPUTE, quantize="int4")
    dense = load_dense(str(tmp_path / "base"), COMPUTE)
    assert {n: tuple(t.shape) for n, t in dense_state(base.model)} == {
        n: tuple(t.shape) for n, t in dense.model.named_parameters()
    }


def test_a_program_may_merge_it_too(tmp_path: Path) -> None:
    base, adapter = trained_on(tmp_path, "nf4")
    wanted = our_logits(base.model)
    report = merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.float32)
    assert report.max_logit_difference < FLOAT32_BOUND
    assert (our_logits(load_dense(str(tmp_path / "merged"), COMPUTE).model) - wanted).abs().max() < FLOAT32_BOUND
