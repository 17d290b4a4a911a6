"""Combining against PEFT's `add_weighted_adapter` on a tiny Llama, and against what each kind promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.combine import KINDS, Combination, Update, combine, combine_module
from alpaca_lora.errors import ConfigError
from tests.adapters.conftest import make_twins

Inputs = list[dict[str, Update]]
FACTORS = [kind for kind, how in KINDS.items() if how.on == "factors"]
PEFT_ON_TRANSFORMERS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
# the rank and alpha of PEFT's result are its doing, not the factors'
SAME: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj", "o_proj"]},
]
OTHER_RANKS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}},
]
RSLORA: list[dict[str, Any]] = [{**config, "use_rslora": True} for config in SAME]


def how_for(kind: str, **changes: Any) -> Combination:
    density = 0.4 if KINDS[kind].thin else None
    return Combination(kind, **{"density": density, **changes})


def peft_model(configs: list[dict[str, Any]]) -> Any:
    """A tiny Llama with one trained adapter for each configuration, named 0, 1 and so on."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    for index, config in enumerate(configs):
        settings = LoraConfig(**config, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(make_twins().theirs, settings, adapter_name="0")
        else:
            model.add_adapter(str(index), settings)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers by the base's module names, in PEFT's order."""
    return {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


def updates_of(model: Any, count: int) -> Inputs:
    return [
        {
            name: Update(layer.lora_A[key].weight.data, layer.lora_B[key].weight.data, layer.scaling[key])
            for name, layer in layers_of(model).items()
            if key in layer.lora_A
        }
        for key in map(str, range(count))
    ]


def in_order_of_draws(inputs: Inputs, weights: list[float], how: Combination, order: Any) -> dict[str, Update]:
    """`combine` with one generator for all modules, as PEFT draws its masks."""
    generator = torch.Generator().manual_seed(5)
    rank = how.svd_rank or max(one.rank for updates in inputs for one in updates.values())
    made = {}
    for name in order:
        present = [(u[name], w) for u, w in zip(inputs, weights, strict=True) if name in u]
        own, own_weights = [u for u, _ in present], [w for _, w in present]
        made[name] = combine_module(own, own_weights, how, rank=rank, generator=generator)
    return made


def compare_with_peft(configs: list[dict[str, Any]], weights: list[float], how: Combination) -> None:
    model = peft_model(configs)
    inputs = updates_of(model, len(configs))
    with pytest.MonkeyPatch.context() as patch:
        # called after the new adapter's own random start and before the first mask
        patch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(5))
        model.add_weighted_adapter(
            [str(i) for i in range(len(configs))], weights, "made", combination_type=how.kind, density=how.density,
            majority_sign_method=how.majority_sign_method or "total", svd_rank=how.svd_rank,
        )  # fmt: skip
    layers = {name: layer for name, layer in layers_of(model).items() if "made" in layer.lora_A}
    ours = in_order_of_draws(inputs, weights, how, layers)
    if KINDS[how.kind].thin != "random":
        assert_same_deltas(combine(inputs, weights, how), ours)
    assert len(layers) >= 4
    for name, layer in layers.items():
        # PEFT's factors hold every scale; what it scales them by once more is wrong for rsLoRA, see below
        theirs = layer.lora_B["made"].weight.data @ layer.lora_A["made"].weight.data
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours[name].delta(), theirs, rtol=0, atol=1e-5)


def assert_same_deltas(one: dict[str, Update], other: dict[str, Update]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].delta(), other[name].delta(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("weights", [[0.7, 0.5, 0.3], [1.0, -0.8, 0.5]], ids=["positive", "negative"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pefts(kind: str, weights: list[float]) -> None:
    compare_with_peft(SAME, weights, how_for(kind))


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FACTORS])
def test_ranks_and_targets_may_differ(kind: str) -> None:
    compare_with_peft(OTHER_RANKS, [0.7, -0.4], how_for(kind))


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_ties_svd"])
def test_scales_of_rslora_are_in_the_factors(kind: str) -> None:
    compare_with_peft(RSLORA, [0.7, 0.5, -0.3], how_for(kind))


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if how.elects])
def test_signs_by_frequency(kind: str) -> None:
    how = how_for(kind, majority_sign_method="frequency")
    compare_with_peft(SAME, [0.7, 0.5, 0.3], how)
    inputs = updates_of(peft_model(SAME), 3)
    by_total = combine(inputs, [0.7, 0.5, 0.3], how_for(kind))
    by_count = combine(inputs, [0.7, 0.5, 0.3], how)
    assert any(not torch.equal(by_total[name].lora_B, by_count[name].lora_B) for name in by_total)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if how.on == "updates"])
def test_the_rank_can_be_chosen(kind: str) -> None:
    compare_with_peft(OTHER_RANKS, [0.7, 0.4], how_for(kind, svd_rank=2))


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
def test_peft_scales_a_combined_rslora_once_more() -> None:
    """Why the factors are compared above: should PEFT mend this, compare its whole delta."""
    model = peft_model(RSLORA[:2])
    model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "made", combination_type="cat")
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    assert layer.scaling["made"] == pytest.approx(math.sqrt(8))
    wanted = 0.5 * (layer.get_delta_weight("0") + layer.get_delta_weight("1"))
    made = combine(updates_of(model, 2), [0.5, 0.5], Combination("cat"))["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(made.delta(), wanted)
    assert not torch.allclose(layer.get_delta_weight("made"), wanted, atol=0.1)


# ---- what each kind promises


def random_inputs(ranks: tuple[int, ...] = (3, 3), out: int = 10, width: int = 13) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return [
        {"m": Update(torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), 0.5 + r)}
        for r in ranks
    ]


def weighted(inputs: Inputs, weights: list[float]) -> torch.Tensor:
    return sum((w * one["m"].delta() for one, w in zip(inputs, weights, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("weights", [[0.3, 0.9], [1.0, -2.0]])
def test_cat_and_full_rank_svd_are_exact(weights: list[float]) -> None:
    inputs = random_inputs((2, 5))
    exact = weighted(inputs, weights)
    for how in (Combination("cat"), Combination("svd", svd_rank=7)):
        made = combine(inputs, weights, how)["m"]
        torch.testing.assert_close(made.delta(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        assert (made.rank, made.scale) == (7, 1.0)


def test_svd_is_the_best_of_its_rank_without_the_dense_sum() -> None:
    inputs, weights = random_inputs((4, 5)), [0.6, 0.7]
    left, values, right = torch.linalg.svd(weighted(inputs, weights), full_matrices=False)
    best = left[:, :3] * values[:3] @ right[:3]
    made = combine(inputs, weights, Combination("svd", svd_rank=3))["m"]
    assert made.rank == 3
    torch.testing.assert_close(made.delta(), best, rtol=0, atol=1e-4)


def test_a_rank_is_never_more_than_the_weight_has() -> None:
    made = combine(random_inputs((4, 5), out=3), [1.0, 1.0], Combination("svd", svd_rank=40))["m"]
    assert made.lora_A.shape == (3, 13) and made.lora_B.shape == (3, 3)


def test_linear_of_one_adapter_twice_is_that_adapter() -> None:
    one = random_inputs()[0]
    made = combine([one, one], [0.25, 0.75], Combination("linear"))["m"]
    # (sqrt(1/4) + sqrt(3/4))^2: adding factors is not adding updates, which is why it is called an approximation
    torch.testing.assert_close(made.delta(), one["m"].delta() * (0.5 + math.sqrt(0.75)) ** 2)


def test_masks_belong_to_seed_and_module() -> None:
    inputs = [{"m": one["m"], "n": one["m"]} for one in random_inputs()]
    made = [combine(inputs, [1.0, 1.0], how_for("dare_linear", seed=seed)) for seed in (0, 0, 1)]
    alone = combine([{"n": one["n"]} for one in inputs], [1.0, 1.0], how_for("dare_linear"))
    assert torch.equal(made[0]["m"].lora_A, made[1]["m"].lora_A)
    assert torch.equal(made[0]["n"].lora_A, alone["n"].lora_A)  # other modules do not change it
    assert not torch.equal(made[0]["m"].lora_A, made[2]["m"].lora_A)
    assert not torch.equal(made[0]["m"].lora_A, made[0]["n"].lora_A)


def test_nothing_of_torchs_generator_is_used() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    combine(random_inputs(), [1.0, 1.0], how_for("dare_ties_svd"))
    assert torch.equal(torch.get_rng_state(), before)


def test_density_one_keeps_everything() -> None:
    inputs, weights = random_inputs(), [0.4, 0.8]
    plain = combine(inputs, weights, Combination("linear"))["m"].delta()
    for kind in ("dare_linear", "magnitude_prune"):
        torch.testing.assert_close(combine(inputs, weights, Combination(kind, density=1.0))["m"].delta(), plain)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "tie"}, "unknown 'tie'"),
        ({"kind": "ties"}, "density: missing"),
        ({"kind": "dare_linear", "density": 0.0}, "density: is 0.0"),
        ({"kind": "dare_linear", "density": 1.5}, "density: is 1.5"),
        ({"kind": "cat", "density": 0.5}, "density: combination cat has none"),
        ({"kind": "magnitude_prune", "density": 0.5, "majority_sign_method": "total"}, "majority_sign_method"),
        ({"kind": "ties", "density": 0.5, "svd_rank": 4}, "svd_rank: combination ties has none"),
        ({"kind": "svd", "svd_rank": 0}, "svd_rank: is 0"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Combination(**settings)


@pytest.mark.parametrize("kind", FACTORS)
def test_factors_need_one_rank(kind: str) -> None:
    with pytest.raises(ConfigError, match="ranks 2, 3 in m, expected one rank, choose cat"):
        combine(random_inputs((2, 3)), [1.0, 1.0], how_for(kind))


def test_weights_must_fit() -> None:
    with pytest.raises(ConfigError, match="1 weights for 2 adapters"):
        combine(random_inputs(), [1.0], Combination("cat"))
    with pytest.raises(ConfigError, match="finite"):
        combine(random_inputs(), [1.0, math.nan], Combination("cat"))
