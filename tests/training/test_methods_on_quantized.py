"""Every method that leaves the base's linears as they are, on a base stored by every scheme: a grid, not a product of
code. What trains the linears themselves is refused.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import METHODS, method_class
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear, PackedLinear
from alpaca_lora.models.load import packed_linears
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import SCHEMES
from alpaca_lora.training.checkpoint import CheckpointStore, verify
from alpaca_lora.training.trainer import Trainer
from tests.tiny import tiny_model
from tests.training.tiny_run import digest, log_in, tiny_trainer

ACTIVATIONS_TOO = ("int8_dynamic", "int8_static")  # no dense weight computes the same
SETTINGS: dict[str, dict[str, Any]] = {"nf4": {"block_size": 32}, "fp4": {"block_size": 32}, "int4": {"group_size": 8}}
BESIDE: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {}, "pissa": {},
    "adalora": {"adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 1},
    "ia3": {"lora_target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prefix": {"num_virtual_tokens": 5}, "prompt": {"num_virtual_tokens": 5},
}  # fmt: skip
RATES = {"ia3": 0.1, "prefix": 0.1, "prompt": 0.1}
STEPS = 6
GRID = [(method, scheme) for method in BESIDE for scheme in SCHEMES]


def packed_model(scheme: str) -> CausalLM:
    """The tiny model, its linears but the head stored by ``scheme``; calibrated, if need be, on what they see."""
    model = tiny_model(qkv_bias=True)
    plan = Plan.uniform(model, scheme, SETTINGS.get(scheme))
    for name, parts in made(scheme).items():
        linear: Any = model.get_submodule(name)
        packed = QuantizedLinear(
            linear.in_features, linear.out_features, plan.schemes[name], dtype=torch.float32, bias=linear.bias,
            device="cpu",
        )  # fmt: skip
        packed.set_parts({part: tensor.clone() for part, tensor in parts.items()})
        put(model, name, packed)
    return model


@cache
def made(scheme: str) -> dict[str, dict[str, torch.Tensor]]:
    """Linear -> its parts."""
    model = tiny_model(qkv_bias=True)
    plan = Plan.uniform(model, scheme, SETTINGS.get(scheme))
    inputs: dict[str, torch.Tensor] = {}
    for name in plan.schemes:
        model.get_submodule(name).register_forward_hook(lambda _m, x, _y, name=name: inputs.__setitem__(name, x[0]))
    logits(model)
    return {
        name: one.quantize_calibrated(model.get_submodule(name).weight, [inputs[name]], name=name)  # pyright: ignore
        for name, one in plan.schemes.items()
    }


def dense_model(scheme: str) -> CausalLM:
    """A dense model that holds the weights which the packed one decodes."""
    model = packed_model(scheme)
    for name, packed in packed_linears(model):
        linear = Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        linear.weight.data, linear.bias = packed.dense_weight(), packed.bias  # pyright: ignore
        put(model, name, linear)
    return model


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@torch.no_grad()
def logits(model: CausalLM) -> torch.Tensor:
    ids_T = torch.arange(41) * 7 % 250
    return model.logits(model(ids_T, torch.arange(41), Packed((20, 21))))


def trainer_of(method: str, model: CausalLM, folder: Path | None = None, **more: Any) -> Trainer:
    settings = {"max_steps": STEPS, "validation": False, "learning_rate": RATES.get(method, 0.02), **more}
    return tiny_trainer(folder, model=model, adapter={"method": method, **BESIDE[method]}, **settings)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for name, m in packed_linears(model) for n, b in m.named_buffers(prefix=name)}


@pytest.mark.parametrize(("method", "scheme"), GRID)
class TestGrid:
    def test_it_trains_and_the_packed_weights_stay(self, method: str, scheme: str, tmp_path: Path) -> None:
        """The run's own checks hold as well: every part moved, no frozen number did."""
        model = packed_model(scheme)
        before = buffers(model)
        trainer = trainer_of(method, model, tmp_path, save_steps=1, save_total_limit=9)
        trainer.train()
        losses = [record["train_loss"] for record in trainer.log.records() if "train_loss" in record]
        assert min(losses[-2:]) < losses[0]
        after = {name.replace(".base", ""): buffer for name, buffer in buffers(trainer.model).items()}
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

        # taken up again from its middle
        resumed = trainer_of(
            method, packed_model(scheme), tmp_path / "resumed", resume=verify(CheckpointStore(tmp_path).path(2)),
            save_steps=1, save_total_limit=9,
        )  # fmt: skip
        resumed.train()
        assert digest(resumed) == digest(trainer)
        assert log_in(tmp_path / "resumed" / "metrics.jsonl") == log_in(tmp_path / "metrics.jsonl")

        # saved and read back
        save_adapter(tmp_path / "adapter", trainer.adapter)
        fresh = packed_model(scheme)
        plain = logits(fresh)
        load_adapter(tmp_path / "adapter", fresh)
        assert not torch.equal(logits(fresh), plain)
        # a file holds other tensors than are trained (PiSSA's doubled rank, a prefix's keys and values): float32 sums
        # in another order
        assert torch.allclose(logits(fresh), logits(trainer.model), rtol=1e-4, atol=1e-4)

    def test_the_gradient_of_the_original_weights_is_another(self, method: str, scheme: str) -> None:
        """The negative control of the test above."""
        found = [gradient(trainer_of(method, model)) for model in (packed_model(scheme), tiny_model(qkv_bias=True))]
        assert float((found[0] - found[1]).abs().max()) > 1e-3 * float(found[1].abs().max())


@pytest.mark.parametrize(("method", "scheme"), [pair for pair in GRID if pair[1] not in ACTIVATIONS_TOO])
def test_the_gradient_is_that_of_the_dequantized_weights(method: str, scheme: str) -> None:
    found = [gradient(trainer_of(method, model)) for model in (packed_model(scheme), dense_model(scheme))]
    # two layers of sums in float32, in another order
    largest = float(found[1].abs().max())
    assert largest > 1e-3 and float((found[0] - found[1]).abs().max()) <= 1e-4 * largest


def gradient(trainer: Trainer) -> torch.Tensor:
    """Of the first step, behind parameters that have left their start, where many a gradient is zero."""
    weights = trainer.optimizer._weights
    weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))
    trainer.adapter.set_rows(None)
    trainer._accumulate(trainer.loader.step_batch(0))
    return trainer.optimizer._grads.clone()


def test_a_packed_weight_that_changes_is_noticed() -> None:
    """The negative control of the run's own check."""
    trainer = trainer_of("lora", packed_model("int8"))
    step = trainer.train_step

    def changing() -> None:
        step()
        next(buffer for _, m in packed_linears(trainer.model) for buffer in m.buffers()).view(-1)[0] += 1

    trainer.train_step = changing
    with pytest.raises(NumericalError, match=r"1 of .* frozen weights were changed"):
        trainer.train()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_gradient_checkpointing_on_a_packed_base(method: str) -> None:
    plain, recomputed = (
        gradient(trainer_of(method, packed_model("nf4"), gradient_checkpointing=flag)) for flag in (False, True)
    )
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora"])
def test_in_place_addition_leaves_what_the_base_computed_for_others(method: str) -> None:
    """The update is added into the base's output: which must be nobody else's, and no view."""
    for scheme in SCHEMES:
        model = packed_model(scheme)
        linear, x = model.layers[0].self_attn.q_proj, torch.randn(9, 32)  # pyright: ignore
        alone = linear(x)
        trainer = trainer_of(method, model)
        trainer.optimizer._weights.add_(0.1)
        trainer.adapter.set_rows(None)
        with torch.no_grad():
            adapted = model.layers[0].self_attn.q_proj  # pyright: ignore
            sums = adapted(x)
        assert torch.equal(linear(x), alone) and not torch.equal(sums, alone)


# ---- what trains the linears themselves


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(BESIDE)))
def test_what_trains_packed_weights_is_refused(method: str) -> None:
    model = packed_model("nf4")
    options = AdapterOptions(method=method, train_last_layers=1, bitfit_parts="biases")  # pyright: ignore
    modules = {name: type(module) for name, module in model.named_modules()}
    if method == "bitfit":  # biases are dense beside a packed weight
        method_class(method).attach(model, options, seed=0)
        return
    with pytest.raises(ConfigError, match=r"q_proj is quantized: its weights cannot be trained"):
        method_class(method).attach(model, options, seed=0)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, PackedLinear) for module in model.modules())


def test_the_norms_and_the_head_beside_packed_weights_may_be_trained() -> None:
    trainer = tiny_trainer(
        model=packed_model("nf4"), adapter={"method": "freeze", "trained_modules": ["norm", "lm_head"]}
    )
    trainer.train()
    assert all(value > 0 for value in trainer.adapter.moved().values())


@pytest.mark.parametrize("saved", ["down_proj", "layers.1"])
def test_packed_modules_to_save_are_refused(saved: str) -> None:
    model = packed_model("int4")
    options = AdapterOptions(modules_to_save=[saved], lora_target_modules=["layers.0.self_attn.q_proj"])
    with pytest.raises(ConfigError, match=r"^modules_to_save: .*proj is quantized: its weights cannot be trained"):
        method_class("lora").attach(model, options, seed=0)


def test_a_file_of_dense_modules_is_refused_on_a_packed_base(tmp_path: Path) -> None:
    trainer = tiny_trainer(model=tiny_model(qkv_bias=True), adapter={"method": "freeze", "train_last_layers": 1})
    trainer.train()
    save_adapter(tmp_path / "layer", trainer.adapter)
    with pytest.raises(AdapterError, match=r"layers\.1\..* is quantized here, the file holds its dense weights"):
        load_adapter(tmp_path / "layer", packed_model("nf4"))
