"""Quantization-aware training: what the forward pass computes, what the gradient is, and that folding loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.linear import Linear, PackedLinear, project
from alpaca_lora.quantization.fp8 import FP8
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.int8_dynamic import Int8Dynamic
from alpaca_lora.quantization.int8_static import Int8Static
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.qat import FakeQuantizedAdapted, FakeQuantizedLinear, fake_quantize, fold
from alpaca_lora.quantization.scheme import Scheme
from tests.tiny import tiny_model
from tests.training.tiny_run import tiny_trainer

SCHEMES: dict[str, Scheme] = {
    "int8": Int8(), "int4": Int4(group_size=16), "int4 symmetric": Int4(group_size=8, symmetric=True),
    "nf4": NF4(block_size=32), "fp8": FP8(), "int8_dynamic": Int8Dynamic(),
}  # fmt: skip
ADAPTERS = {
    "lora": {}, "dora": {"method": "dora"}, "pissa": {"method": "pissa"},
    "adalora": {"method": "adalora", "adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 1},
}  # fmt: skip
WHOLE = {"full": {"method": "full"}, "freeze": {"method": "freeze", "train_last_layers": 1}}
ALL = {"lora_target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}


def attach(model: nn.Module, method: dict[str, Any]) -> Adapter:
    options = AdapterOptions(**{"lora_r": 4, "lora_dropout": 0.0, **ALL, **method})
    return method_class(options.method).attach(model, options, seed=0)


def shaken(adapter: Adapter) -> Adapter:
    """The adapter with other values than it starts from."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter.trained_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    adapter.set_rows(None)
    return adapter


@torch.no_grad()
def logits(model: Any, length: int = 37) -> torch.Tensor:
    ids_T = torch.arange(length) * 7 % 250
    return model.logits(model(ids_T, torch.arange(length), Packed((length,))))


def aware(method: dict[str, Any], scheme: Scheme, **model_fields: Any) -> tuple[Any, Adapter, Plan]:
    model = tiny_model(**model_fields)
    plan = Plan.uniform(model, scheme)
    adapter = shaken(attach(model, method))
    fake_quantize(model, plan)
    return model, adapter, plan


# ---- forward


class TestForward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("method", [*ADAPTERS, *WHOLE])
    def test_folding_changes_no_bit(self, method: str, scheme: str, dtype: torch.dtype) -> None:
        model = tiny_model(qkv_bias=True).to(dtype)
        plan = Plan.uniform(model, SCHEMES[scheme])
        shaken(attach(model, {**ADAPTERS, **WHOLE}[method]))
        unquantized = logits(model)
        fake_quantize(model, plan)
        before = logits(model)
        assert not torch.equal(before, unquantized)
        errors = fold(model, plan)
        assert errors and all(0 < error < 0.3 for error in errors.values())
        assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in plan.schemes)
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("method", [*ADAPTERS, *WHOLE])
    def test_a_saved_adapter_folds_to_the_same(self, method: str, scheme: str, tmp_path: Path) -> None:
        model, adapter, plan = aware({**ADAPTERS, **WHOLE}[method], SCHEMES[scheme])
        save_adapter(tmp_path / "a", adapter)
        fresh = tiny_model()
        load_adapter(tmp_path / "a", fresh)
        fold(fresh, plan)
        assert torch.equal(logits(fresh), logits(model))
        # the negative control: base and adapter quantized apart
        apart = tiny_model()
        load_adapter(tmp_path / "a", apart)
        if method in ADAPTERS:
            for name, module in list(apart.named_modules()):
                if name.endswith(".base"):
                    packed = QuantizedLinear.from_dense(module, SCHEMES[scheme], name=name)
                    apart.get_submodule(name.removesuffix(".base")).base = packed
        assert not torch.equal(logits(apart), logits(model))

    def test_training_sees_what_evaluation_sees(self) -> None:
        model, _, _ = aware({}, Int4(group_size=16))
        ids_T, plan = torch.arange(40), Packed((40,))  # fewer rows have kernels of their own without gradients
        learned = model(ids_T, torch.arange(40), plan)
        with torch.no_grad():
            evaluated = model(ids_T, torch.arange(40), plan)
        assert learned.requires_grad and torch.equal(learned, evaluated)

    def test_linears_beside_the_adapter_are_quantized_for_good(self) -> None:
        model, _, plan = aware({"lora_target_modules": ["q_proj"]}, Int8())
        kinds = {name.rpartition(".")[2]: type(model.get_submodule(name)) for name in plan.schemes}
        assert kinds.pop("q_proj") is FakeQuantizedAdapted and set(kinds.values()) == {QuantizedLinear}
        assert isinstance(model.lm_head, Linear)

    def test_shapes_of_three_axes(self) -> None:
        model, _, _ = aware({}, Int8())
        linear, x = model.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
        assert torch.equal(linear(x).reshape(10, -1), linear(x.reshape(10, 32)))

    def test_removing_the_adapter_gives_back_the_base(self) -> None:
        model, adapter, _ = aware({"lora_target_modules": "all-linear"}, Int8())
        adapter.remove()
        assert torch.equal(logits(model), logits(tiny_model()))

    def test_any_adapter_that_merges_folds(self) -> None:
        """IA3, which changes biases too: as if it had been merged first."""
        targets = {"lora_target_modules": ["k_proj", "down_proj"], "ia3_feedforward_modules": ["down_proj"]}
        model, other = tiny_model(qkv_bias=True), tiny_model(qkv_bias=True)
        plan = Plan.uniform(model, Int8())
        shaken(attach(model, {"method": "ia3", **targets}))
        shaken(attach(other, {"method": "ia3", **targets})).merge()
        fold(model, plan)
        fold(other, plan)
        assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), logits(tiny_model()))


# ---- gradient


def straight_through(rounded: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """The value of one, the gradient of the other: with a dense product, the definition."""
    return smooth + (rounded - smooth).detach()


def wanted_weight(layer: Any, rounded: torch.Tensor) -> torch.Tensor:
    """Q(W') with the gradient of W' as each method's paper writes it; the norm of DoRA a constant."""
    base = layer.base.weight.detach()
    if type(layer).__name__ == "AdaLoRALinear":
        return straight_through(rounded, base + layer.scale * layer.lora_B @ (layer.lora_E * layer.lora_A))
    summed = base + layer.scale * layer.lora_B @ layer.lora_A
    if type(layer).__name__ != "DoRALinear":
        return straight_through(rounded, summed)
    unit = summed / summed.norm(dim=1, keepdim=True).detach()
    magnitude = layer.magnitude[:, None]
    # Q(m v) = m Q(v): the magnitude sees the quantized row
    return (
        straight_through(rounded, magnitude.detach() * unit)
        + (magnitude - magnitude.detach()) * rounded / magnitude.detach()
    )


@pytest.mark.parametrize("shape", [(32, 16), (16, 13), (48, 1)])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_gradient_of_an_adapter_is_straight_through(method: str, scheme: str, shape: tuple[int, int]) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Linear(*shape, bias=True)

    torch.manual_seed(0)
    model = One()
    for parameter in (model.proj.weight, model.proj.bias):
        parameter.data.normal_()
    rank = {"lora_r": 1, "adalora_init_r": 2}
    plan = Plan.uniform(model, SCHEMES[scheme])
    shaken(attach(model, {**ADAPTERS[method], **rank, "lora_target_modules": ["proj"]}))
    fake_quantize(model, plan)
    layer = model.proj.adapted
    x, upstream = torch.randn(9, shape[0], requires_grad=True), torch.randn(9, shape[1])
    model.proj(x).backward(upstream)
    found = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    weight = wanted_weight(layer, model.proj.dense_weight())
    nn.functional.linear(x, weight, layer.base.bias).backward(upstream)
    wanted = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}
    assert found.keys() == wanted.keys() and len(found) > 2
    for name, gradient in found.items():
        # sums of at most 48 products, in float32, in another order
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().max())), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_weight_is_straight_through(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear(16, 11, bias=True, dtype=dtype)
    linear.weight.data.normal_()
    linear.bias.data.normal_()  # pyright: ignore
    linear.requires_grad_(True)
    fake = FakeQuantizedLinear.taking_over(linear, Int4(group_size=8), "it")
    x, upstream = torch.randn(9, 16).to(dtype).requires_grad_(), torch.randn(9, 11).to(dtype)
    fake(x).backward(upstream)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-5}
    assert torch.allclose(x.grad, upstream @ fake.dense_weight(), **tolerance)
    assert torch.allclose(linear.weight.grad, upstream.t() @ x.detach(), **tolerance)
    assert torch.allclose(linear.bias.grad, upstream.sum(0), **tolerance)  # pyright: ignore
    assert not torch.allclose(x.grad, upstream @ linear.weight, **tolerance)  # the negative control


def test_a_group_gets_the_gradients_that_each_gets_alone() -> None:
    found = []
    for together in (True, False):
        model, adapter, _ = aware({"lora_target_modules": ["q_proj", "v_proj"]}, Int8())
        attention = model.layers[0].self_attn
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
        outputs = project(x, linears) if together else tuple(linear(x) for linear in linears)
        sum(y.square().sum() for y in outputs).backward()
        found.append([p.grad for _, p in adapter.trained_parameters() if p.grad is not None])
    assert len(found[0]) == 4
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*found, strict=True))


# ---- when it is made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the linears that were quantized, each time."""
    found: list[str] = []
    right = Int8.quantize

    def counted(self: Int8, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        found.append(name)
        return right(self, weight_OI, name=name)

    monkeypatch.setattr(Int8, "quantize", counted)
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_once_per_optimizer_step_however_it_is_cut(method: str, calls: list[str]) -> None:
    trainer = tiny_trainer(
        adapter={"method": method, "lora_dropout": 0.0}, scheme=Int8(), batches={"micro_batch_size": 1},
        gradient_checkpointing=True,
    )  # fmt: skip
    trained = 4 if method == "lora" else 14  # q and v, or all, of two layers
    for _ in range(2):
        calls.clear()
        trainer.train_step()
        assert len(calls) == trained and len(set(calls)) == trained
    calls.clear()
    trainer.evaluate()
    assert len(calls) == trained
    trainer.evaluate()
    assert len(calls) == trained


def test_a_write_that_leaves_no_trace_is_noticed() -> None:
    model, adapter, _ = aware({}, Int8())
    before = logits(model)
    _, parameter = next(adapter.trained_parameters())
    parameter.data.view(-1)[0] += 3.0
    assert not torch.equal(logits(model), before)


def test_what_is_made_in_inference_mode_may_be_trained_with() -> None:
    model, _, _ = aware({}, Int8())
    with torch.inference_mode():
        logits(model)
    model(torch.arange(9), torch.arange(9), Packed((9,))).sum().backward()


def test_another_dtype_is_made_anew() -> None:
    model, _, _ = aware({"method": "full"}, Int8())
    logits(model)
    linear = model.layers[0].self_attn.q_proj
    assert linear.dense_weight().dtype == torch.float32
    assert linear.to(torch.bfloat16).dense_weight().dtype == torch.bfloat16


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, adapter, _ = aware({}, Int8())
    _, parameter = next(adapter.trained_parameters())
    parameter.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        logits(model)


# ---- training


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8_dynamic"])
@pytest.mark.parametrize("method", [*ADAPTERS, *WHOLE])
def test_the_loss_of_the_quantized_model_falls(method: str, scheme: str) -> None:
    """And the run passes its own checks: that all parts moved, that what is frozen did not."""
    trainer = tiny_trainer(
        adapter={**ALL, "lora_dropout": 0.0, **{**ADAPTERS, **WHOLE}[method]}, scheme=SCHEMES[scheme], max_steps=12,
    )  # fmt: skip
    losses = [record["train_loss"] for record in [*_logged(trainer)] if "train_loss" in record]
    assert min(losses[-3:]) < losses[0] - 0.1


def _logged(trainer: Any) -> list[dict[str, Any]]:
    trainer.train()
    return trainer.log.records()


def test_freeze_counts_the_packed_weights_of_the_rest() -> None:
    plain = attach(tiny_model(), WHOLE["freeze"])
    _, adapter, _ = aware(WHOLE["freeze"], Int8())
    assert dict(adapter.facts())["trained weights"] == dict(plain.facts())["trained weights"]


def test_packed_linears_of_the_rest_count_as_weights() -> None:
    model = tiny_model()
    count = model.num_parameters()
    attach(model, {"lora_target_modules": ["q_proj"]})
    beside = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fake_quantize(model, Plan({n: Int8() for n, m in model.named_modules() if _is_rest(n, m)}))
    assert model.num_parameters() == count + beside
    assert any(isinstance(module, PackedLinear) for module in model.modules())


def _is_rest(name: str, module: nn.Module) -> bool:
    return name.endswith("q_proj") or (isinstance(module, Linear) and not name.endswith(("base", "lm_head")))


# ---- what cannot be


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"method": "ia3", "lora_target_modules": ["k_proj"], "ia3_feedforward_modules": []},
            r"IA3Linear\) cannot learn",
        ),
        ({"method": "prompt", "num_virtual_tokens": 2}, "no weight is trained that would be quantized"),
        ({"method": "prefix", "num_virtual_tokens": 2}, "no weight is trained that would be quantized"),
        ({"method": "bitfit"}, "no weight is trained that would be quantized"),
        ({"method": "freeze", "trained_modules": ["norm"]}, "no weight is trained that would be quantized"),
    ],
)  # fmt: skip
def test_methods_that_train_no_weight_are_refused(method: dict[str, Any], message: str) -> None:
    model = tiny_model()
    plan = Plan.uniform(model, Int8())
    options = AdapterOptions(**method)
    method_class(options.method).attach(model, options, seed=0, encode_text=lambda text: list(text.encode()))
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=rf"^quantization_aware: .*{message}"):
        fake_quantize(model, plan)
    assert {name: type(module) for name, module in model.named_modules()} == modules


def test_dropout_is_refused() -> None:
    model = tiny_model()
    plan = Plan.uniform(model, Int8())
    attach(model, {"lora_dropout": 0.1})
    fake_quantize(model, plan)
    with pytest.raises(ConfigError, match=r"^lora_dropout: .*expected 0"):
        model(torch.arange(9), torch.arange(9), Packed((9,)))


def test_calibrated_schemes_are_refused() -> None:
    model = tiny_model()
    plan = Plan.uniform(model, Int8Static())
    attach(model, {})
    with pytest.raises(ConfigError, match="scheme int8_static is made by running the model on rows"):
        fake_quantize(model, plan)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_quantized_base_is_refused(method: str) -> None:
    model, _, plan = aware({"method": method}, Int8())
    with pytest.raises(ConfigError, match=r"is quantized already, expected a dense base model"):
        fake_quantize(model, plan)
