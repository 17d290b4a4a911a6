"""The LoRA layer against the plain formula, and the adapter as a whole: attach, seed, dropout, merge, remove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.adapters.lora import Lora, effective_rank, read_pattern
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear, initial_A
from alpaca_lora.errors import AdapterError, ConfigError, MachineError, NumericalError
from alpaca_lora.kernels.dropout import DropoutKey, keep_mask
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.linear import Linear, LinearContract, project
from tests.adapters.conftest import IDS, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
KEYS = torch.arange(11, dtype=torch.int32) * 7919


def make_layers(dtype: torch.dtype, p: float) -> list[nn.Module]:
    """q and v adapted with different ranks and scales, k between them not adapted."""
    generator = torch.Generator().manual_seed(0)
    rows = DropoutRows(p, KEYS if p else None)
    layers: list[nn.Module] = []
    for rank, out, scale in ((3, 10, 2.0), (0, 6, 0.0), (5, 7, 0.5)):
        base = Linear(13, out, bias=True, dtype=dtype)
        for parameter in base.parameters():
            parameter.data.normal_(generator=generator)
        a, b = torch.randn(rank, 13, generator=generator), torch.randn(out, rank, generator=generator)
        layers.append(LoRALinear(base, a, b, scale, rows, salt=5) if rank else base)
    return layers


def plain_formula(x: torch.Tensor, layers: list[nn.Module], p: float) -> list[torch.Tensor]:
    """y = x W^T + b + s drop(x) A^T B^T, in float32 or whatever x is, by autograd."""
    dropped = x * keep_mask(DropoutKey(KEYS, p, 5), 13) / (1 - p) if p else x
    outputs = []
    for layer in layers:
        base: Any = layer.base if isinstance(layer, LoRALinear) else layer
        y = F.linear(x, base.weight.to(x.dtype), base.bias.to(x.dtype))
        if isinstance(layer, LoRALinear):
            y = y + layer.scale * (dropped @ layer.lora_A.to(x.dtype).t() @ layer.lora_B.to(x.dtype).t())
        outputs.append(y)
    return outputs


def gradients(outputs: Any, x: torch.Tensor, layers: list[nn.Module]) -> list[torch.Tensor]:
    wanted = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    weights = [torch.linspace(-1, 1, y.numel()).reshape(y.shape) for y in outputs]
    loss = sum(((y.float() * w).sum() for y, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_formula(dtype: torch.dtype, p: float) -> None:
    layers = make_layers(dtype, p)
    x = torch.randn(11, 13, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    got, want = project(x, layers), plain_formula(exact_x, layers, p)
    got_grads, want_grads = gradients(got, x, layers), gradients(want, exact_x, layers)
    assert all(y.dtype == dtype for y in got)
    # all parameters that train are the adapters', and they are float32 whatever the base is
    assert all(g.dtype == torch.float32 for g in got_grads[1:]) and len(got_grads) == 5
    # float32: rounding of sums over at most 13 terms. bfloat16: 2^-8 for each of the three roundings in a row.
    tolerance = 2e-6 if dtype == torch.float32 else 3 * 2**-8
    for one, other in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert (one.float() - other).abs().max() <= tolerance * other.abs().max()


def test_dropout_is_one_mask_for_all_that_share_an_input() -> None:
    layers = make_layers(torch.float32, 0.5)
    x = torch.randn(11, 13)
    together, alone = project(x, layers), [layer(x) for layer in layers]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_wider_inputs_keep_their_axes() -> None:
    layer = make_layers(torch.float32, 0.0)[0]
    x = torch.randn(2, 3, 4, 13)
    torch.testing.assert_close(layer(x), layer(x.reshape(24, 13)).reshape(2, 3, 4, 10))


def test_dropout_keys_must_belong_to_the_input() -> None:
    layer = make_layers(torch.float32, 0.5)[0]
    with pytest.raises(ValueError, match="keys for 11 rows, the input has 12"):
        layer(torch.randn(12, 13))


def test_two_adapters_in_one_group_drop_each_in_their_own_way() -> None:
    q, _, v = make_layers(torch.float32, 0.5)
    assert isinstance(v, LoRALinear)
    v.rows = DropoutRows(0.0)
    x = torch.randn(11, 13)
    together = project(x, (q, v))
    torch.testing.assert_close(together[0], q(x))
    torch.testing.assert_close(together[1], v(x))


def test_start_is_seeded_by_name_and_leaves_the_model_as_it_was(options: Make) -> None:
    model, before = tiny_model(), our_logits(tiny_model())
    adapter = Lora.attach(model, options(), seed=1)
    assert torch.equal(our_logits(model), before)  # lora_B is zero
    assert not any(adapter.moved().values()) and len(adapter.moved()) == 4
    wider = Lora.attach(tiny_model(), options(lora_target_modules="all-linear"), seed=1)
    other = Lora.attach(tiny_model(), options(), seed=2)
    first, more, others = adapter.state_tensors(), wider.state_tensors(), other.state_tensors()
    a_keys = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], more[key]) for key in first)  # adding targets changes no start
    assert not any(torch.equal(first[key], others[key]) for key in a_keys)
    assert len({float(first[key].sum()) for key in a_keys}) == len(a_keys)


def test_start_has_the_distribution_of_kaiming_uniform() -> None:
    a = initial_A(0, "x", 64, 400)
    bound = 1 / 400**0.5
    reference = torch.empty(64, 400)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert a.abs().max() <= bound and a.dtype == torch.float32
    assert abs(float(a.std() / reference.std()) - 1) < 0.02 and abs(float(a.mean())) < bound / 50


def test_only_the_adapter_trains_and_everything_of_it_gets_a_gradient(options: Make) -> None:
    model = tiny_model().requires_grad_(True)
    adapter = Lora.attach(model, options(lora_target_modules="all-linear", lora_dropout=0.1), seed=0)
    names = dict(adapter.trained_parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in names.values()}
    assert all(p.dtype == torch.float32 for p in names.values()) and list(names) == list(adapter.state_tensors())
    train_a_little(adapter)
    adapter.set_rows(torch.arange(len(IDS), dtype=torch.int32))
    hidden = model(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
    model.logits(hidden).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in names.values())
    assert all(norm > 0 for norm in adapter.moved().values())


def test_dropout_is_on_only_between_set_rows_and_none(options: Make) -> None:
    model = tiny_model()
    adapter = Lora.attach(model, options(lora_dropout=0.5), seed=0)
    train_a_little(adapter)
    quiet = our_logits(model)
    rows = torch.arange(len(IDS), dtype=torch.int32)
    adapter.set_rows(rows)
    noisy = our_logits(model)
    assert (noisy - quiet).abs().max() > 0.01
    assert torch.equal(noisy, our_logits(model))  # the same rows, the same masks
    adapter.set_rows(rows + 1)
    assert not torch.equal(noisy, our_logits(model))
    adapter.set_rows(None)
    assert torch.equal(quiet, our_logits(model))


def test_layers_draw_different_masks(options: Make) -> None:
    adapter = Lora.attach(tiny_model(), options(lora_target_modules="all-linear"), seed=0)
    assert len({layer.salt for layer in adapter.layers.values()}) == len(adapter.layers)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scale(options: Make, rslora: bool, scale: float) -> None:
    adapter = Lora.attach(tiny_model(), options(use_rslora=rslora), seed=0)
    assert {layer.scale for layer in adapter.layers.values()} == {scale}


def test_a_rank_above_the_weights_own_is_said(options: Make) -> None:
    adapter = Lora.attach(tiny_model(), options(lora_r=20, lora_target_modules=["k_proj", "q_proj"]), seed=0)
    assert [m.split(":")[0] for m in adapter.messages] == [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_r": 0}, "lora_r: is 0"), ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout: is 1.0"), ({"lora_target_modules": ["nope"]}, "'nope' matches nothing"),
        ({"lora_target_modules": ["lm_head"]}, "head cannot be adapted"),
    ],
)  # fmt: skip
def test_impossible_options_leave_the_model_alone(options: Make, change: dict[str, Any], match: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=match):
        Lora.attach(model, options().model_copy(update=change), seed=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_two_adapters_on_one_target_are_refused(options: Make) -> None:
    model = tiny_model()
    Lora.attach(model, options(), seed=0)
    for spec in (["q_proj"], ["all-linear"], ["o_proj", "v_proj"]):
        with pytest.raises(AdapterError, match="already carries an adapter"):
            Lora.attach(model, options(lora_target_modules=spec), seed=0)
    with pytest.raises(ConfigError, match="base of a linear that carries an adapter"):
        Lora.attach(model, options(lora_target_modules=["q_proj.base"]), seed=0)
    Lora.attach(model, options(lora_target_modules=["o_proj"]), seed=0)  # another target is free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_base_plus_adapter_in_float32(options: Make, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    adapter = Lora.attach(model, options(lora_target_modules="all-linear"), seed=0)
    train_a_little(adapter)
    layers = dict(adapter.layers)
    expected = {n: (y.base.weight.float() + y.scale * y.lora_B @ y.lora_A).detach() for n, y in layers.items()}  # pyright: ignore
    merged = dict(adapter.merged_tensors())
    before = our_logits(model)
    adapter.merge()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=0, atol=1e-6)
        stored = model.get_submodule(name).weight
        assert stored.dtype == dtype and torch.equal(stored, merged[f"{name}.weight"].to(dtype))  # pyright: ignore
    if dtype == torch.float32:
        torch.testing.assert_close(our_logits(model), before, rtol=0, atol=1e-4)
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_merging_twice_is_an_error_and_changes_nothing(options: Make) -> None:
    model = tiny_model()
    adapter = Lora.attach(model, options(), seed=0)
    train_a_little(adapter)
    adapter.merge()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for again in (adapter.merge, adapter.remove, lambda: list(adapter.merged_tensors())):
        with pytest.raises(AdapterError, match="merged or removed"):
            again()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_remove_restores_the_model_exactly(options: Make) -> None:
    model = tiny_model()
    before, logits = {n: t.clone() for n, t in model.state_dict().items()}, our_logits(model)
    adapter = Lora.attach(model, options(), seed=0)
    train_a_little(adapter)
    assert not torch.equal(our_logits(model), logits)
    adapter.remove()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(our_logits(model), logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merging_what_is_not_finite_changes_nothing(options: Make, bad: float) -> None:
    model = tiny_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = Lora.attach(model, options(), seed=0)
    train_a_little(adapter)
    adapter.layers["model.layers.1.self_attn.v_proj"].lora_B.data[0, 0] = bad
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.v_proj: .*NaN or Inf"):
        adapter.merge()
    adapter.remove()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_merging_into_a_shared_weight_is_refused(options: Make) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    net["out"].weight = net["embed"].weight
    adapter = Lora.attach(net, options(lora_target_modules=["out"], lora_r=2), seed=0)
    train_a_little(adapter)
    with pytest.raises(AdapterError, match="shared"):
        adapter.merge()


def test_any_module_with_linears_can_be_adapted(options: Make) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(2, 5, 4)
    before = net(x)
    adapter = Lora.attach(net, options(lora_target_modules="all-linear", lora_r=2), seed=0)
    assert torch.equal(net(x), before) and isinstance(net[0], LinearContract)
    optimizer = torch.optim.SGD([p for _, p in adapter.trained_parameters()], lr=0.1)
    for _ in range(3):
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(adapter.moved().values()) and net(x).square().mean() < before.square().mean()
    tuned = net(x).detach()
    adapter.merge()
    assert [type(module) for module in net] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(net(x), tuned, rtol=0, atol=1e-5)


def test_state_goes_back_in_and_only_if_it_fits(options: Make) -> None:
    adapter = Lora.attach(tiny_model(), options(), seed=0)
    train_a_little(adapter)
    state = adapter.state_tensors()
    other = Lora.attach(tiny_model(), options(), seed=5)
    other.load_state_tensors(state)
    assert all(torch.equal(t, state[key]) for key, t in other.state_tensors().items())
    with pytest.raises(AdapterError, match="other tensors"):
        other.load_state_tensors({**state, "extra": torch.zeros(1)})
    with pytest.raises(AdapterError, match="shape"):
        other.load_state_tensors({key: t[:1] for key, t in state.items()})


def test_dense_weight_is_what_the_layer_multiplies_by() -> None:
    layer = make_layers(torch.float32, 0.0)[0]
    assert isinstance(layer, LoRALinear)
    x = torch.randn(3, 13)
    bias: Any = layer.base.bias
    torch.testing.assert_close(F.linear(x, layer.dense_weight(), bias), layer(x), rtol=1e-5, atol=1e-5)


def test_matrices_that_cannot_be_held_are_not_made(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr("alpaca_lora.adapters.lora.available_memory_bytes", lambda: 1000)
    with pytest.raises(MachineError, match=r"lora_r: the adapter's matrices need .* GB"):
        Lora.attach(model, options(), seed=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


# ---- the proof that it acted


def steps(adapter: Lora, num_steps: int, still: str | None = None) -> None:
    """What a run would leave, step by step; but for the parameters whose key ends with ``still``."""
    adapter.begin(num_steps)
    for step in range(num_steps):
        kept = {k: p.detach().clone() for k, p in adapter.trained_parameters() if still and k.endswith(still)}
        train_a_little(adapter, seed=step)
        with torch.no_grad():
            for key, parameter in adapter.trained_parameters():
                parameter.copy_(kept.get(key, parameter))
        adapter.after_step(step)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_factor_that_stood_still_is_noticed(options: Make, part: str) -> None:
    adapter = Lora.attach(tiny_model(), options(), seed=0)
    steps(adapter, 4, still=f"v_proj.{part}.weight")
    with pytest.raises(NumericalError, match=rf"{part} did not move in 2 modules .*layers\.0\.self_attn\.v_proj"):
        adapter.check_acted()
    adapter = Lora.attach(tiny_model(), options(), seed=0)
    steps(adapter, 4)
    adapter.check_acted()


def test_a_scale_that_is_not_the_file_s_is_noticed(options: Make) -> None:
    """rsLoRA that was trained as LoRA, say."""
    plain = Lora.attach(tiny_model(), options(), seed=0)
    stable = Lora.attach(tiny_model(), options(use_rslora=True), seed=0)
    for adapter in (plain, stable):
        adapter.check_acted()
    stable.layers["model.layers.1.self_attn.q_proj"].scale = plain.layers["model.layers.1.self_attn.q_proj"].scale
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.q_proj: was trained with a scale of 2, .* says 4"):
        stable.check_acted()


def test_the_report_says_what_scale_which_rates_and_which_ranks(options: Make) -> None:
    def facts(**changes: Any) -> dict[str, str]:
        adapter = Lora.attach(tiny_model(), options(**changes), seed=0)
        train_a_little(adapter)
        return dict(adapter.facts())

    assert facts()["scale"] == "2 = alpha / rank" and "learning rate of lora_B" not in facts()
    assert facts(use_rslora=True)["scale"] == "4 = alpha / sqrt(rank), rank-stabilized"
    assert facts(rank_pattern=["q_proj=2"])["scale"] == "2 to 4 = alpha / rank"
    assert facts(lora_plus_ratio=16)["learning rate of lora_B"] == "16 times that of lora_A (LoRA+)"
    assert facts()["effective rank"].endswith("of 4, mean over modules")
    assert "of 2 to 4, " in facts(rank_pattern=["q_proj=2"])["effective rank"]
    assert "of 16, " in facts(lora_r=20, lora_target_modules=["k_proj"])["effective rank"]  # it has no more


def test_effective_rank() -> None:
    layer: Any = make_layers(torch.float32, 0.0)[2]
    a, _ = torch.linalg.qr(torch.randn(13, 5))
    b, _ = torch.linalg.qr(torch.randn(7, 5))
    layer.lora_A.data, layer.lora_B.data = a.t().contiguous(), b
    assert effective_rank(layer) == pytest.approx(5)
    layer.lora_B.data[:, 2:] = 0
    assert effective_rank(layer) == pytest.approx(2)
    layer.lora_B.data.zero_()
    assert effective_rank(layer) == 0


def test_a_pattern_given_twice_is_refused() -> None:
    assert read_pattern(["q_proj=4", "v_proj=4"], "rank_pattern", int) == {"q_proj": 4, "v_proj": 4}
    for entries in (["q_proj=4", "q_proj=8"], ["q_proj=4", "v_proj=2", "q_proj=4"]):
        with pytest.raises(ConfigError, match=r"rank_pattern: q_proj is given twice: 4 and [48], keep one"):
            read_pattern(entries, "rank_pattern", int)
