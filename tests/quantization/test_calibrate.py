"""Quantization over sample rows: of a file as of a loaded model, one dense layer at a time, in the right order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from alpaca_lora.errors import ConfigError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear
from alpaca_lora.models.load import Base, packed_linears
from alpaca_lora.quantization.calibrate import quantize_model, quantize_source
from alpaca_lora.quantization.gptq import gptq, hessian
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.weights.huggingface import HuggingFaceFolder
from tests.quantization.calibration_models import ARCHITECTURES, FLOAT32, load, rows, save

WAYS = [("int4", "nearest"), ("int4", "gptq"), ("int4", "awq"), ("int8_static", "nearest"), ("nf4", "gptq")]
BY_WEIGHTS = [("int4", "nearest"), ("nf4", "awq"), ("int8", "gptq")]  # no linear of these is made on rows


def uniform(scheme: str, model: CausalLM) -> Plan:
    return Plan.uniform(model, scheme)


def from_file(folder: Path, scheme: str, method: str, **arguments: Any) -> tuple[Base, Plan, dict[str, float]]:
    return quantize_source(
        folder, FLOAT32, lambda model: uniform(scheme, model), lambda _: rows(), rounding=method, **arguments
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_what_the_loaded_model_gives(name: str, way: tuple[str, str], tmp_path: Path) -> None:
    folder = save(name, tmp_path / "base")
    loaded = load(folder)
    plan, errors = quantize_model(loaded, uniform(way[0], loaded.model), rows(), rounding=way[1])
    streamed, same_plan, same_errors = from_file(folder, *way)
    assert same_plan == plan and same_errors == errors and set(errors) == set(plan.schemes)
    expected = dict(packed_linears(loaded.model))
    assert set(expected) == set(plan.schemes) and len(expected) > 10
    for linear, packed in packed_linears(streamed.model):
        other: Any = expected[linear]
        assert all(torch.equal(part, other.stored_parts()[n]) for n, part in packed.stored_parts().items())  # pyright: ignore
    ids_T, positions_T = torch.arange(20), torch.arange(20)
    with torch.no_grad():
        hidden = [base.model(ids_T, positions_T, Packed([20])) for base in (streamed, loaded)]
    assert torch.equal(*hidden) and torch.isfinite(hidden[0]).all()
    assert not any(parameter.is_meta for parameter in streamed.model.parameters())


def test_later_layers_see_quantized_ones(tmp_path: Path) -> None:
    folder = save("llama2-grouped-query", tmp_path / "base")
    base, dense = load(folder), load(folder)
    name, scheme = "model.layers.1.self_attn.q_proj", Int4(32)
    quantize_model(base, uniform("int4", base.model), rows(), rounding="gptq")
    made: Any = base.model.get_submodule(name)

    def seen(model: CausalLM) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        ids_T, lengths = torch.cat(rows()), [len(row) for row in rows()]
        with torch.no_grad():
            model(ids_T, torch.cat([torch.arange(length) for length in lengths]), Packed(lengths))
        handle.remove()
        return inputs

    weight_OI = dense.model.get_parameter(f"{name}.weight")
    behind_quantized = gptq(weight_OI, hessian(seen(base.model)), scheme, name=name)
    behind_dense = gptq(weight_OI, hessian(seen(dense.model)), scheme, name=name)
    assert torch.equal(made.codes, behind_quantized["codes"])
    assert not torch.equal(made.codes, behind_dense["codes"])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_one_dense_layer_at_a_time(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder, alive, most = save(name, tmp_path / "base"), list[StorageWeakRef](), [0]
    read = HuggingFaceFolder.read

    def counted(source: HuggingFaceFolder, name: str, **arguments: Any) -> torch.Tensor:
        tensor = read(source, name, **arguments)
        if name.endswith(("_proj.weight", "c_fc.weight")):
            alive.append(StorageWeakRef(tensor.untyped_storage()))
            most[0] = max(most[0], sum(not one.expired() for one in alive))
        return tensor

    monkeypatch.setattr(HuggingFaceFolder, "read", counted)
    base, plan, _ = from_file(folder, "int4", method)
    of_a_layer = len(plan.schemes) // len(base.model.layers)
    assert of_a_layer <= most[0] <= of_a_layer + 1  # the layer's own, and one as it is stored
    assert len(alive) == 2 * len(plan.schemes) and all(one.expired() for one in alive)
    assert not [n for n, module in base.model.named_modules() if isinstance(module, Linear) and n in plan.schemes]


def test_it_says_what_it_does_and_can_be_stopped(tmp_path: Path) -> None:
    folder = save("gemma3", tmp_path / "base")
    said: list[tuple[int, int, str]] = []
    from_file(folder, "int4", "gptq", on_progress=lambda *what: said.append(what))
    assert [(done, total) for done, total, _ in said] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all("error" in text and "rounded" in text and f"layer {done}, " in text for done, _, text in said)

    class Enough(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        said.append((done, total, what))
        raise Enough

    del said[:]
    with pytest.raises(Enough):
        from_file(folder, "int4", "gptq", on_progress=stop)
    assert len(said) == 1


def test_compensation_has_less_error_than_rounding(tmp_path: Path) -> None:
    folder = save("llama2-grouped-query", tmp_path / "base")
    mean = {}
    for method in ("nearest", "gptq", "awq"):
        plan, errors = quantize_model(base := load(folder), _with_static(base.model), rows(8), rounding=method)
        mean[method] = sum(errors[name] for name in plan.schemes if "k_proj" not in name) / len(errors)
    assert mean["gptq"] < 0.9 * mean["nearest"] and mean["awq"] <= mean["nearest"]


def _with_static(model: CausalLM) -> Plan:
    """int4, and one linear that is made on rows by itself, so that errors are of outputs whatever the method."""
    static = Plan.uniform(model, "int8_static").schemes
    return Plan({n: static[n] if "k_proj" in n else scheme for n, scheme in uniform("int4", model).schemes.items()})


def test_a_plan_of_some_linears_and_of_the_head(tmp_path: Path) -> None:
    folder = save("llama2-grouped-query", tmp_path / "base")
    plan = Plan({"model.layers.1.mlp.up_proj": Int8(), "lm_head": Int4(16)})
    loaded = load(folder)
    weight_VD = loaded.model.get_parameter("lm_head.weight").clone()
    carried_out, errors = quantize_model(loaded, plan, rows(), rounding="gptq")
    assert carried_out == plan and set(errors) == set(plan.schemes)
    assert [name for name, _ in packed_linears(loaded.model)] == list(plan.schemes)
    head: Any = loaded.model.lm_head
    assert 0 < (head.dense_weight() - weight_VD).norm() < 0.2 * weight_VD.norm()
    streamed, _, same = quantize_source(folder, FLOAT32, lambda _: plan, lambda _: rows(), rounding="gptq")
    again: Any = streamed.model.lm_head
    assert same == errors and torch.equal(again.codes, head.codes)


def test_rows_that_are_missing_or_too_few(tmp_path: Path) -> None:
    folder = save("llama2-grouped-query", tmp_path / "base")
    for scheme, method in dict.fromkeys((*WAYS, *BY_WEIGHTS)):
        base = load(folder)
        if (scheme, method) in BY_WEIGHTS:
            _, errors = quantize_model(base, uniform(scheme, base.model), [], rounding=method)
            assert len(errors) == len(packed_linears(base.model))
            continue
        for few in ([], rows(2)):
            with pytest.raises(ConfigError, match=r"^calibration_data: .*at least 128 tokens"):
                quantize_model(base, uniform(scheme, base.model), few, rounding=method)
        assert packed_linears(base.model) == []
