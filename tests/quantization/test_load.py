"""A quantized base: the same while it is loaded and from a folder; never dense in memory; what cannot be is refused."""

from __future__ import annotations

import ctypes
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import alpaca_lora
from alpaca_lora.device import Compute
from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.kernels.cpu.library import Library
from alpaca_lora.models.linear import Linear
from alpaca_lora.models.load import load_base as load_dense
from alpaca_lora.models.load import packed_linears
from alpaca_lora.quantization.folder import Origin
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import load_base, packed_fingerprint
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.weights.gguf import GgufFile
from alpaca_lora.weights.huggingface import write_folder
from tests.adapters.conftest import our_logits
from tests.commands.conftest import write_base
from tests.tiny import ByteTokenizer, tiny_model

COMPUTE = Compute(torch.device("cpu"), torch.float32, 1, "test")
ON_LOAD = ("nf4", "fp4", "fp8", "int8", "int4", "int8_dynamic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "tiny", max_shard_bytes=30_000)


@pytest.mark.parametrize("scheme", ON_LOAD)
def test_what_is_loaded_is_what_the_scheme_makes_of_the_stored_weights(folder: Path, scheme: str) -> None:
    dense, base = load_dense(str(folder), COMPUTE), load_base(str(folder), COMPUTE, quantize=scheme)
    plan = Plan.uniform(dense.model, scheme)
    assert dict(packed_linears(base.model)).keys() == plan.schemes.keys()
    for name, linear in packed_linears(base.model):
        assert isinstance(linear, QuantizedLinear)
        weight: Any = dense.model.get_submodule(name).weight
        parts = plan.schemes[name].quantize(weight.detach(), name=name)
        assert all(torch.equal(linear.get_buffer(part), tensor) for part, tensor in parts.items())
    assert isinstance(base.model.lm_head, Linear)
    # the logits move, and not far
    change = (our_logits(base.model) - our_logits(dense.model)).abs().mean()
    assert 0 < change < 0.5 * our_logits(dense.model).std()
    assert base.description == f"{dense.description}, quantized: {plan.summary(shapes(plan, dense))}"
    assert base.model.num_parameters() == dense.model.num_parameters()


def shapes(plan: Plan, base: Any) -> dict[str, tuple[int, int]]:
    return {name: tuple(base.model.get_submodule(name).weight.shape) for name in plan.schemes}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_that_a_slow_kernel_is_in_use_is_said(folder: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Library(ctypes.CDLL(None), "compiled by cc")
    monkeypatch.setattr("alpaca_lora.quantization.load.library", lambda: there)
    assert not any("compiler" in one for one in load_base(str(folder), COMPUTE, quantize=scheme).notices)
    without = Library(None, "plain torch (no C compiler here)")
    monkeypatch.setattr("alpaca_lora.quantization.load.library", lambda: without)
    said = [one for one in load_base(str(folder), COMPUTE, quantize=scheme).notices if "no C compiler here" in one]
    assert len(said) == (scheme == "nf4")  # int8 is torch's own products


def test_the_compute_dtype_does_not_change_the_codes(folder: Path) -> None:
    half = Compute(torch.device("cpu"), torch.bfloat16, 1, "test")
    one, other = load_base(str(folder), COMPUTE, quantize="int8"), load_base(str(folder), half, quantize="int8")
    for (_, linear), (_, twin) in zip(packed_linears(one.model), packed_linears(other.model), strict=True):
        assert torch.equal(linear.get_buffer("codes"), twin.get_buffer("codes"))
        assert linear.dense_weight().dtype == torch.float32 and twin.dense_weight().dtype == torch.bfloat16
    assert one.fingerprint == other.fingerprint


def test_fingerprints(folder: Path) -> None:
    def of(**asked: Any) -> str:
        return load_base(str(folder), COMPUTE, **asked).fingerprint

    dense = load_dense(str(folder), COMPUTE)
    assert of() == dense.fingerprint
    several = [
        of(), of(quantize="nf4"), of(quantize="nf4", settings={"double_quant": False}), of(quantize="int8"),
        of(quantize="int4"), of(quantize="int4", settings={"symmetric": True}),
    ]  # fmt: skip
    assert len(set(several)) == len(several)
    plan = Plan.uniform(dense.model, "nf4")
    by_plan = partial(Plan.from_entries, entries=plan.to_entries(), file="f")
    assert of(plan_of=by_plan) == of(quantize="nf4") == packed_fingerprint(Origin("n", dense.fingerprint), plan)


def test_rows_count_only_where_the_weights_depend_on_them(folder: Path) -> None:
    model = load_dense(str(folder), COMPUTE).model
    int4, static = Plan.uniform(model, "int4"), Plan.uniform(model, "int8_static")
    with_rows, without = Origin("n", "f", calibration_sha256="c"), Origin("n", "f")
    assert packed_fingerprint(with_rows, int4) == packed_fingerprint(without, int4)
    assert packed_fingerprint(with_rows, static) != packed_fingerprint(without, static)
    gptq = [Origin("n", "f", rounding="gptq", calibration_sha256=rows) for rows in "cd"]
    folded = Origin("n", "f", adapter_sha256="a")
    assert len({packed_fingerprint(one, int4) for one in (*gptq, without, folded)}) == 4


def test_a_gguf_is_quantized_while_it_is_loaded(smollm2: Path) -> None:
    base = load_base(str(smollm2), COMPUTE, quantize="int8")
    source = GgufFile(smollm2)
    try:
        name, linear = packed_linears(base.model)[0]
        parts = linear.scheme.quantize(source.read(f"{name}.weight"), name=name)  # pyright: ignore
        assert torch.equal(linear.get_buffer("codes"), parts["codes"])
        assert base.fingerprint != source.fingerprint
    finally:
        source.close()


def test_no_dense_weight_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dense weight at a time: each is gone before the next is read."""
    alive: list[Any] = []

    def on_read(name: str, linear: QuantizedLinear, weight: torch.Tensor | None) -> None:
        assert weight is not None and [other for other in alive if other() is not None] == []
        alive.append(weakref.ref(weight))

    base = load_base(str(folder), COMPUTE, quantize="int8", on_read=on_read)
    assert len(alive) == 14 and all(not p.requires_grad for p in base.model.parameters())
    assert sum("proj" in name for name, _ in base.model.named_parameters()) == 0


def test_the_public_name_is_this_one() -> None:
    assert alpaca_lora.load_base is load_base


# ---- what cannot be


def test_schemes_that_need_rows(folder: Path) -> None:
    says = (
        r"^quantization_plan: model\.layers\.0\.mlp\.up_proj: scheme int8_static is made by running the model on rows, "
    )
    entries = [{"modules": "up_proj", "scheme": "int8_static"}]
    with pytest.raises(
        ConfigError, match=says + "give the folder that `alpaca-lora quantize --calibration_data` makes"
    ):
        load_base(str(folder), COMPUTE, plan_of=partial(Plan.from_entries, entries=entries, file="f"))


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 4] = float("nan")  # pyright: ignore
    write_folder(
        tmp_path / "nan", model.state_dict().items(), model.config.to_hf(), tokenizer_saver=ByteTokenizer().save
    )
    for scheme in ON_LOAD:
        with pytest.raises(NumericalError, match=r"nan/model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: "):
            load_base(str(tmp_path / "nan"), COMPUTE, quantize=scheme)
