"""DoRA against the plain formula and against PEFT; the factored norm, when it is kept and when it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.adapters.dora import Dora, DoRALinear
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear
from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.errors import NumericalError
from alpaca_lora.kernels.dropout import DropoutKey, keep_mask
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.linear import Linear, project
from tests.adapters import peft_twin
from tests.adapters.conftest import IDS, Twins, make_twins, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
KEYS = torch.arange(11, dtype=torch.int32) * 7919


class Counted(Linear):
    """A base that counts how often its dense weight is asked for."""

    asked = 0

    def dense_weight(self) -> torch.Tensor:
        self.asked += 1
        return super().dense_weight()


def make_layer(
    rank: int, out: int, scale: float, rows: DropoutRows, dtype: torch.dtype = torch.float32, kind: Any = DoRALinear
) -> Any:
    generator = torch.Generator().manual_seed(out)
    base = Counted(13, out, bias=True, dtype=dtype)
    for parameter in base.parameters():
        parameter.data.normal_(generator=generator)
    a, b = torch.randn(rank, 13, generator=generator), torch.randn(out, rank, generator=generator)
    layer = kind(base, a, b, scale, rows, 5)
    if kind is DoRALinear:
        layer.magnitude.data.mul_(1 + 0.3 * torch.rand(out, generator=generator))
    return layer


def plain_formula(x: torch.Tensor, layer: Any, p: float) -> torch.Tensor:
    """Equation 5 with the dense norm, by autograd, in x's dtype."""
    dropped = x * keep_mask(DropoutKey(KEYS, p, 5), 13) / (1 - p) if p else x
    weight, bias = layer.base.weight.to(x.dtype), layer.base.bias.to(x.dtype)
    summed = x @ weight.t() + layer.scale * (dropped @ layer.lora_A.t()) @ layer.lora_B.t()
    if not isinstance(layer, DoRALinear):
        return summed + bias
    norm_O = (weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    return layer.magnitude / norm_O * summed + bias


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_formula(dtype: torch.dtype, p: float) -> None:
    """In a group with a plain linear and a plain LoRA."""
    rows = DropoutRows(p, KEYS)
    plain = make_layer(1, 6, 1.0, rows, dtype, LoRALinear).base
    lora = make_layer(2, 5, 1.5, rows, dtype, LoRALinear)
    for order in ((0, 1, 2, 3), (2, 3, 1, 0)):
        group = [make_layer(3, 10, 2.0, rows, dtype), plain, lora, make_layer(4, 7, 0.5, rows, dtype)]
        layers = [group[i] for i in order]
        x = torch.randn(11, 13, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        exact_x = x.detach().float().requires_grad_()
        exact = [
            F.linear(exact_x, one.weight.float(), one.bias.float()) if one is plain else plain_formula(exact_x, one, p)
            for one in layers
        ]
        got = project(x, layers)
        trained = [p for one in layers if one is not plain for n, p in one.named_parameters() if "base" not in n]
        results = [*got, *_gradients(got, [x, *trained])]
        wanted = [*exact, *_gradients(exact, [exact_x, *trained])]
        tolerance = 4e-6 if dtype == torch.float32 else 5 * 2**-8
        for one, other in zip(results, wanted, strict=True):
            assert (one.float() - other).abs().max() <= tolerance * other.abs().max()


def _gradients(outputs: Any, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    losses = [(y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in outputs]
    return list(torch.autograd.grad(torch.stack(losses).sum(), wanted))


def test_the_factored_norm_is_the_dense_one() -> None:
    layer = make_layer(3, 10, 2.0, DropoutRows(0.0))
    dense = (layer.base.weight + 2.0 * layer.lora_B @ layer.lora_A).norm(dim=1)
    torch.testing.assert_close(layer.inverse_norm(), 1 / dense.detach(), rtol=2e-6, atol=0)
    assert (dense / layer.base.weight.norm(dim=1) - 1).abs().min() > 0.01  # the update turns every row


def test_the_norm_is_kept_for_decoding_and_never_stale(options: Make) -> None:
    layer = make_layer(3, 10, 2.0, rows := DropoutRows(0.1))
    x = torch.randn(1, 13)

    def right() -> bool:
        return torch.allclose(layer(x), plain_formula(x, layer, 0.0), atol=1e-4)

    # somebody's own loop, of `adapt` or without it: nobody says when weights change, and torch does not always know
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    for automatic in (False, True):
        rows.automatic = automatic
        layer.eval()  # no dropout
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert right()
            layer.lora_B.mul_(1.5)
            assert right()
            layer.lora_A.data.mul_(1.5)  # behind torch's back
            assert right()
            layer.lora_A.data = layer.lora_A.data * 1.5
            assert right()
    # a training step of ours: told of every change, so that a layer that runs again pays nothing
    rows.automatic, rows.keys_T = False, KEYS[:1]
    layer.weights_changed()
    asked = layer.base.asked
    layer(x)
    layer(x)
    assert layer.base.asked == asked + 1
    # an adapter that is used and not trained
    rows.keys_T = None
    layer.requires_grad_(False)
    layer.weights_changed()
    asked = layer.base.asked
    assert right() and right() and right() and layer.base.asked == asked + 1
    layer.lora_B.mul_(3.0)  # torch counts its own writes
    assert right() and layer.base.asked == asked + 2


def test_our_trainer_keeps_the_norm_while_it_samples(options: Make) -> None:
    adapter = Dora.attach(tiny_model(), options(), seed=0)
    layer = next(iter(adapter.layers.values()))
    asked: list[int] = []
    squares = layer.squares
    layer.squares = lambda: asked.append(1) or squares()
    with torch.no_grad():
        for told, count in ((False, 2), (True, 1)):  # the control first: not told, computed each time
            if told:
                adapter.set_rows(KEYS)
            adapter.set_rows(None)
            asked.clear()
            layer(torch.randn(3, 32))
            layer(torch.randn(3, 32))
            assert len(asked) == count


def test_what_was_kept_does_not_outlive_a_move(options: Make) -> None:
    layer = make_layer(3, 10, 2.0, DropoutRows(0.0)).requires_grad_(False)
    assert layer.inverse_norm() is layer.inverse_norm()
    model = nn.Sequential(layer)
    model.to("meta")  # any other device
    assert layer.inverse_norm().is_meta


def test_what_inference_mode_kept_serves_outside_of_it() -> None:
    layer = make_layer(3, 10, 2.0, DropoutRows(0.0)).requires_grad_(False)
    x = torch.randn(2, 13)
    with torch.inference_mode():
        inside = layer(x)
    x.requires_grad_()
    outside = layer(x)
    outside.sum().backward()
    assert x.grad is not None and torch.equal(inside, outside.detach())


def test_set_rows_and_loading_drop_what_was_kept(options: Make) -> None:
    model = tiny_model()
    adapter = Dora.attach(model, options(), seed=0)
    train_a_little(adapter)
    first, state = our_logits(model), adapter.state_tensors()
    for _, parameter in adapter.trained_parameters():
        parameter.data = parameter.data * 2
    adapter.set_rows(None)
    assert (our_logits(model) - first).abs().max() > 0.01
    adapter.load_state_tensors(state)
    assert torch.equal(our_logits(model), first)


def test_gradient_checkpointing_changes_nothing(options: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        adapter = Dora.attach(model, options(lora_dropout=0.3), seed=0)
        train_a_little(adapter)
        model.gradient_checkpointing = checkpointing
        adapter.set_rows(torch.arange(len(IDS), dtype=torch.int32))
        model(IDS, torch.arange(len(IDS)), Packed([len(IDS)])).square().sum().backward()
        gradients.append([p.grad for _, p in adapter.trained_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_start_is_the_base_and_nothing_has_moved(options: Make) -> None:
    model = tiny_model()
    adapter = Dora.attach(model, options(lora_target_modules=peft_twin.PROJECTIONS), seed=0)
    torch.testing.assert_close(our_logits(model), our_logits(tiny_model()), rtol=0, atol=1e-5)
    assert set(adapter.moved().values()) == {0.0} and adapter.config["use_dora"] is True
    names = [key for key, p in adapter.trained_parameters()]
    assert sum(key.endswith(".lora_magnitude_vector") for key in names) == 14 and len(names) == 42
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in adapter.trained_parameters()}


def test_moved_is_the_norm_of_the_change_of_the_weight(options: Make) -> None:
    adapter = Dora.attach(tiny_model(), options(), seed=0)
    for small in (1.0, 1e-4):
        for layer in adapter.layers.values():
            generator = torch.Generator().manual_seed(1)
            layer.lora_B.data.normal_(generator=generator).mul_(small)
            layer.magnitude.data.mul_(1 + small * torch.rand(len(layer.magnitude), generator=generator))
        adapter.set_rows(None)
        for name, change in adapter.moved().items():
            layer = adapter.layers[name]
            before, after = layer.base.weight.double(), layer.merged_weight().double()
            assert change == pytest.approx(float((after - before).norm()), rel=1e-3)
            cosine = F.cosine_similarity(after, before, dim=1)
            magnitude, direction = layer.changes()
            assert direction == pytest.approx(float((1 - cosine).mean()), rel=1e-2, abs=1e-12)
            assert magnitude == pytest.approx(
                float((after.norm(dim=1) / before.norm(dim=1) - 1).abs().mean()), rel=1e-2
            )


@pytest.mark.parametrize("what", ["magnitude", "direction"])
def test_a_run_that_was_something_else_fails(options: Make, what: str) -> None:
    adapter = Dora.attach(tiny_model(), options(), seed=0)
    with pytest.raises(NumericalError, match="did not move"):
        adapter.check_acted()
    train_a_little(adapter)
    adapter.check_acted()
    layer = adapter.layers["model.layers.1.self_attn.v_proj"]
    if what == "magnitude":
        layer.magnitude.data.copy_(layer.base.weight.norm(dim=1))
    else:
        layer.lora_B.data.zero_()
    with pytest.raises(NumericalError, match=rf"the {what} of 1 of 4 modules .*layers\.1\.self_attn\.v_proj"):
        adapter.check_acted()


def test_the_report_says_how_far_magnitude_and_direction_went(options: Make) -> None:
    adapter = Dora.attach(tiny_model(), options(), seed=0)
    start = dict(adapter.facts())
    train_a_little(adapter)
    end = dict(adapter.facts())
    assert start["magnitude change"].startswith("0 %") and start["direction change"].startswith("1 - cosine 0,")
    assert start.keys() == end.keys() and all(
        start[name] != end[name] for name in ("magnitude change", "direction change")
    )


def test_a_row_of_zeros_stays_zero(options: Make) -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        net[0].weight[1].zero_()  # pyright: ignore
    Dora.attach(net, options(lora_target_modules=["0"], lora_r=2), seed=0)
    y = net(torch.randn(5, 4))
    y.sum().backward()
    assert torch.isfinite(y).all() and not y[:, 1].any()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_merging_is_the_function_and_removing_the_base(options: Make) -> None:
    model, start = tiny_model(qkv_bias=True), our_logits(tiny_model(qkv_bias=True))
    adapter = Dora.attach(model, options(lora_target_modules=["all-linear"]), seed=0)
    train_a_little(adapter)
    tuned = our_logits(model)
    assert (tuned - start).abs().max() > 0.1
    adapter.merge()
    torch.testing.assert_close(our_logits(model), tuned, rtol=0, atol=1e-4)
    again = tiny_model(qkv_bias=True)
    adapter = Dora.attach(again, options(), seed=0)
    train_a_little(adapter)
    adapter.remove()
    assert torch.equal(our_logits(again), start)


# --- PEFT


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_target_modules": peft_twin.PROJECTIONS, "lora_r": 3, "use_rslora": True},
        {"rank_pattern": ["q_proj=2"]},
    ],
)
def test_peft_loads_ours_and_merges_the_same(twins: Twins, options: Make, tmp_path: Path, changes: dict) -> None:
    adapter = Dora.attach(twins.ours, options(**changes), seed=0)
    peft_twin.our_steps(twins.ours, adapter)
    theirs = peft_twin.assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    assert theirs.peft_config["default"].use_dora
    peft_twin.assert_merges_as_peft(twins, adapter, theirs)


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_steps_end_where_peft_s_do(options: Make, tmp_path: Path, bias: bool) -> None:
    """From PEFT's own start: A, B and magnitudes after each side's own gradient steps."""
    from peft import LoraConfig, get_peft_model

    twins = make_twins(qkv_bias=bias, output_bias=bias)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=peft_twin.PROJECTIONS, task_type="CAUSAL_LM")
    theirs = get_peft_model(twins.theirs, config)
    theirs.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    adapter, _ = load_adapter(tmp_path / "start", twins.ours, trainable=True)
    assert isinstance(adapter, Dora)
    start = twins.our_logits()
    peft_twin.their_steps(theirs, learning_rate=0.1)
    peft_twin.our_steps(twins.ours, adapter, learning_rate=0.1)
    difference = (twins.their_logits(theirs) - twins.our_logits()).abs().max()
    assert difference < 1e-5 and (twins.our_logits() - start).abs().max() > 0.01, difference
    adapter.check_acted()


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
def test_we_load_peft_s_and_write_what_it_wrote(twins: Twins, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(twins.theirs, config)
    peft_twin.their_steps(theirs)
    adapter = peft_twin.assert_we_load_peft_s(twins, theirs, tmp_path)
    assert isinstance(adapter, Dora)
    peft_twin.assert_merges_as_peft(twins, adapter, theirs)
