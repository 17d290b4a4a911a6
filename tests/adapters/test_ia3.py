"""IA3 against the plain formula and against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alpaca_lora.adapters.ia3 import IA3, IA3Linear, feedforward_names
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.linear import Linear, project
from tests.adapters import peft_twin
from tests.adapters.conftest import Twins, make_twins, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
USUAL = ["k_proj", "v_proj", "down_proj"]


@pytest.fixture
def usual(options: Make) -> Make:
    return lambda **changes: options(**{"lora_target_modules": USUAL, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_formula(dtype: torch.dtype) -> None:
    """A group of a scaled output, a plain linear and a scaled input, over a wider input."""
    generator = torch.Generator().manual_seed(0)
    layers: list[Any] = []
    for out, feedforward in ((10, False), (6, None), (7, True)):
        base = Linear(13, out, bias=True, dtype=dtype)
        for parameter in base.parameters():
            parameter.data.normal_(generator=generator)
        factors = 1 + 0.3 * torch.randn((1, 13) if feedforward else (out, 1), generator=generator)
        layers.append(base if feedforward is None else IA3Linear(base, factors, feedforward))
    x = torch.randn(3, 5, 13, generator=generator).to(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    first, plain, last = layers

    def linear(base: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, base.weight.float(), base.bias.float())

    wanted = [
        linear(first.base, exact_x) * first.ia3_l.flatten(), linear(plain, exact_x),
        linear(last.base, exact_x * last.ia3_l.flatten()),
    ]  # fmt: skip
    got = project(x, layers)
    factors = [first.ia3_l, last.ia3_l]
    results = [*got, *torch.autograd.grad([y.float().square().sum() for y in got], [x, *factors])]
    exact = [*wanted, *torch.autograd.grad([y.square().sum() for y in wanted], [exact_x, *factors])]
    tolerance = 2e-6 if dtype == torch.float32 else 4 * 2**-8
    for one, other in zip(results, exact, strict=True):
        assert one.shape == other.shape and (one.float() - other).abs().max() <= tolerance * other.abs().max()


def test_start_is_the_base_exactly_and_only_factors_train(usual: Make) -> None:
    model = tiny_model()
    adapter = IA3.attach(model, usual(), seed=0)
    assert torch.equal(our_logits(model), our_logits(tiny_model()))
    shapes = {key.split(".", 5)[5]: tuple(p.shape) for key, p in adapter.trained_parameters() if ".layers.0." in key}
    assert shapes == {
        "self_attn.k_proj.ia3_l": (16, 1), "self_attn.v_proj.ia3_l": (16, 1), "mlp.down_proj.ia3_l": (1, 48)
    }  # fmt: skip
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in adapter.trained_parameters()}
    assert set(adapter.moved().values()) == {0.0} and len(adapter.moved()) == 6
    train_a_little(adapter)
    layer = adapter.layers["model.layers.0.mlp.down_proj"]
    assert adapter.moved()["model.layers.0.mlp.down_proj"] == pytest.approx(float((layer.ia3_l.detach() - 1).norm()))
    assert dict(adapter.facts())["factors"].endswith("160 of them")


def test_merging_is_the_function_and_removing_the_base(usual: Make) -> None:
    """With biases: that of a scaled output is scaled, that of a scaled input is not."""
    overrides = {"qkv_bias": True, "mlp_bias": True}
    model, start = tiny_model(**overrides), our_logits(tiny_model(**overrides))
    adapter = IA3.attach(model, usual(), seed=0)
    train_a_little(adapter)
    names = {name for name, _ in adapter.merged_tensors()}
    assert "model.layers.0.self_attn.k_proj.bias" in names and "model.layers.0.mlp.down_proj.bias" not in names
    tuned = our_logits(model)
    assert (tuned - start).abs().max() > 0.1
    adapter.merge()
    torch.testing.assert_close(our_logits(model), tuned, rtol=0, atol=1e-4)
    again = tiny_model(**overrides)
    adapter = IA3.attach(again, usual(), seed=0)
    train_a_little(adapter)
    adapter.remove()
    assert torch.equal(our_logits(again), start)


def test_lora_beside_it_in_one_group(usual: Make, options: Make) -> None:
    """On other targets of the same projection: whichever class is asked first, both act."""
    model = tiny_model()
    IA3.attach(model, usual(), seed=0)
    ia3_only = our_logits(model)
    lora = Lora.attach(model, options(lora_target_modules=["q_proj"]), seed=0)
    train_a_little(lora)
    both = our_logits(model)
    lora.remove()
    assert (both - ia3_only).abs().max() > 0.01 and torch.equal(our_logits(model), ia3_only)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_target_modules": ["k_proj"]}, "'down_proj' is none of the targets"),
        ({"lora_target_modules": ["down_projj"]}, "'down_projj' matches nothing"),
        ({"ia3_feedforward_modules": ["fc2"]}, r"ia3_feedforward_modules: 'fc2' .*expected some of k_proj, v_proj"),
    ],
)
def test_impossible_options_leave_the_model_alone(usual: Make, changes: dict[str, Any], match: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=match):
        IA3.attach(model, usual(**changes), seed=0)
    assert not any(isinstance(module, IA3Linear) for module in model.modules())


def test_feedforward_modules_follow_peft_s_rule() -> None:
    names = ["a.down_proj", "a.k_proj", "b.down_proj"]
    assert feedforward_names(names, ["down_proj"]) == {"a.down_proj", "b.down_proj"}
    assert feedforward_names(names, "a.*proj") == {"a.down_proj", "a.k_proj"}
    assert feedforward_names(names, []) == set()
    assert feedforward_names(["a" * 60], r"(([a-z._]*)*)*!") == set()  # `re` would take years


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": 3}, "target_modules"), ({"target_modules": ["nope"]}, "matches nothing"),
        ({"feedforward_modules": "("}, "not a regular expression"),
        ({"feedforward_modules": ["x"] * 5000}, "feedforward_modules: has 5000 entries"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_right_is_refused(usual: Make, changes: dict[str, Any], match: str) -> None:
    config = {**IA3.attach(tiny_model(), usual(), seed=0).config, **changes}
    with pytest.raises(AdapterError, match=match):
        IA3.expected_shapes(tiny_model(), config, file="adapter_config.json")


def test_unknown_keys_and_an_untrained_file_are_said(usual: Make) -> None:
    adapter = IA3.attach(tiny_model(), usual(), seed=0)
    config = {**adapter.config, "novelty": 1}
    loaded = IA3.from_peft(tiny_model(), config, adapter.state_tensors(), trainable=False, file="f")
    assert loaded.messages == [
        "f: novelty: unknown key, kept as it is and not used", "f: the adapter changes nothing: every factor is one"
    ]  # fmt: skip


# --- PEFT


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"lora_target_modules": ["all-linear"]}, {"layers_to_transform": [1]},
        {"lora_target_modules": [r".*\.1\..*(k|down)_proj"]},
        {"lora_target_modules": ["q_proj", "mlp.down_proj"], "ia3_feedforward_modules": ["layers.0.mlp.down_proj"]},
        {"ia3_feedforward_modules": []}, {"ia3_feedforward_modules": ["down_proj", "k_proj"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_peft_loads_ours_and_merges_the_same(usual: Make, tmp_path: Path, changes: dict[str, Any], bias: bool) -> None:
    twins = make_twins(qkv_bias=bias, output_bias=bias, mlp_bias=bias)
    adapter = IA3.attach(twins.ours, usual(**changes), seed=0)
    start = twins.our_logits()
    peft_twin.our_steps(twins.ours, adapter)
    assert (twins.our_logits() - start).abs().max() > 0.01
    theirs = peft_twin.assert_peft_loads_ours(twins, adapter, tmp_path / "a")
    inside = {name for name, layer in adapter.layers.items() if layer.feedforward}
    found = {name for name, module in theirs.base_model.model.named_modules() if getattr(module, "is_feedforward", 0)}
    assert found == inside
    merged = theirs.merge_and_unload().state_dict()
    adapter.merge()
    assert all((weight - merged[name]).abs().max() < 1e-5 for name, weight in twins.ours.state_dict().items())


@pytest.mark.filterwarnings(peft_twin.PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": USUAL, "feedforward_modules": ["down_proj"]},
        {"target_modules": r".*\.(k|v|down)_proj", "feedforward_modules": r".*\.0\..*down_proj"},
        {"target_modules": "all-linear", "feedforward_modules": [], "exclude_modules": ["o_proj"]},
    ],
)
def test_we_load_peft_s_and_the_same_steps_lead_to_the_same(
    twins: Twins, tmp_path: Path, config: dict[str, Any]
) -> None:
    from peft import IA3Config, get_peft_model

    theirs = get_peft_model(twins.theirs, IA3Config(task_type="CAUSAL_LM", **config))
    theirs.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    model = tiny_model()
    adapter, _ = load_adapter(tmp_path / "start", model, trainable=True)
    assert isinstance(adapter, IA3)
    peft_twin.their_steps(theirs)
    peft_twin.our_steps(model, adapter)
    peft_twin.assert_we_load_peft_s(twins, theirs, tmp_path)
    difference = (our_logits(model) - twins.our_logits()).abs().max()
    assert difference < 1e-5 and (our_logits(model) - our_logits(tiny_model())).abs().max() > 0.01, difference
