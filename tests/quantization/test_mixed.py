"""Mixed plans: the knapsack against all combinations, budgets of bits and of perplexity, of a file and loaded."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alpaca_lora.errors import ConfigError
from alpaca_lora.models.load import packed_linears
from alpaca_lora.quantization.calibrate import quantize_model
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.layer_walk import LayerWalk
from alpaca_lora.quantization.mixed import (
    Budget,
    Choices,
    best_plan,
    knapsack,
    loss_with,
    measure_choices,
    mixed_plan,
    quantize_source_mixed,
    smallest_plan,
)
from alpaca_lora.quantization.plan import Plan
from tests.quantization.calibration_models import ARCHITECTURES, FLOAT32, load, rows, save


@pytest.mark.parametrize("whole", [True, False])
def test_knapsack_equals_all_combinations(whole: bool) -> None:
    random.seed(0)
    for _ in range(60):
        counts = [random.randint(1, 4) for _ in range(random.randint(1, 6))]
        sizes = [[float(random.randint(1, 40)) for _ in range(count)] for count in counts]
        if not whole:
            sizes = [[size * math.pi for size in own] for own in sizes]
        costs = [[random.random() for _ in own] for own in sizes]
        smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
        budget = random.uniform(smallest, largest)
        all_picks = itertools.product(*(range(count) for count in counts))
        total = [(sum(s[p] for s, p in zip(sizes, one, strict=True)), one) for one in all_picks]
        best = min(sum(c[p] for c, p in zip(costs, one, strict=True)) for size, one in total if size <= budget)
        found = knapsack(sizes, costs, budget)
        assert sum(s[p] for s, p in zip(sizes, found, strict=True)) <= budget * (1 + 1e-9)
        assert sum(c[p] for c, p in zip(costs, found, strict=True)) == pytest.approx(best)


def test_knapsack_of_the_smallest_budget() -> None:
    assert knapsack([[3.0, 1.0], [2.0, 2.0]], [[0.0, 9.0], [2.0, 1.0]], 3.0) == [1, 1]


def choices(num_linears: int = 12) -> Choices:
    """Linears of which each is less sensitive than the one before."""
    names = [f"linear_{place}" for place in range(num_linears)]
    schemes = (Int4(128), Int8(), None)
    bits = [64 * 256 * one.bits_per_weight(64, 256) if one else 64 * 256 * 16.0 for one in schemes]
    return Choices(
        dict.fromkeys(names, schemes), dict.fromkeys(names, bits),
        {name: [0.1 * 0.7**place, 0.001 * 0.7**place, 0.0] for place, name in enumerate(names)},
        dict.fromkeys(names, (64, 256)), 2.0,
    )  # fmt: skip


def growth_of(found: Choices, plan: Plan) -> float:
    return sum(own[list(found.schemes[name]).index(plan.schemes.get(name))] for name, own in found.growth.items())


def test_more_bits_never_cost_more() -> None:
    found = choices()
    low, high = found.bounds()
    before = math.inf
    for step in range(40):
        bits = low + (high - low) * step / 40
        plan = best_plan(found, bits)
        assert found.bits_of(plan) <= bits * (1 + 1e-9)
        assert growth_of(found, plan) <= before
        before = growth_of(found, plan)
    # the linears that suffer most get the bits
    finer = [name for name, scheme in best_plan(found, 6).schemes.items() if isinstance(scheme, Int8)]
    assert finer == [f"linear_{place}" for place in range(len(finer))] and len(finer) == 5


def test_bits_that_cannot_be() -> None:
    for bits, what in ((3.9, "cannot be reached"), (16.0, "quantize nothing")):
        with pytest.raises(ConfigError, match=rf"^bits: .*{what}, expected at least 4\.188"):
            best_plan(choices(), bits)


def test_the_smallest_plan_within_a_measured_loss() -> None:
    found, asked = choices(), list[Plan]()

    def loss_of(plan: Plan) -> float:
        asked.append(plan)
        return found.loss + 1.5 * growth_of(found, plan)  # measured is worse than predicted

    bits = []
    for increase in (0.001, 0.01, 0.05, 0.2, 0.5, 2.0):
        del asked[:]
        plan, loss = smallest_plan(found, increase, loss_of)
        assert loss == loss_of(plan) <= found.loss + math.log1p(increase)
        bits.append(found.bits_of(plan))
        assert len(asked) <= 9
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[3] > bits[-1] == found.bounds()[0]
    with pytest.raises(ConfigError, match=r"^max_perplexity_increase: .* expected more than 0\.0\d+"):
        smallest_plan(found, 0.01, lambda plan: found.loss + 0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_what_the_loaded_model_gives(name: str, tmp_path: Path) -> None:
    folder, bits = save(name, tmp_path / "base"), 8.0
    base = load(folder)
    plan, _ = mixed_plan(base, rows(), bits=bits, max_perplexity_increase=None, rounding="gptq")
    assert packed_linears(base.model) == []
    kinds = {type(scheme) for scheme in plan.schemes.values()}
    assert len(kinds) > 1
    streamed, carried_out, errors, table = quantize_source_mixed(
        folder, FLOAT32, Budget(bits=bits), lambda _: rows(), rounding="gptq"
    )
    assert carried_out == plan and set(errors) == set(plan.schemes)
    assert {n for n, _ in packed_linears(streamed.model)} == set(plan.schemes)
    _, same_errors = quantize_model(base, plan, rows(), rounding="gptq")
    assert same_errors == errors
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert "perplexity on the calibration rows" in text and "q_proj" in text and "dense" in text


def test_a_budget_of_perplexity_holds_when_measured(tmp_path: Path) -> None:
    base = load(save("llama2-grouped-query", tmp_path / "base"))
    walk, said = LayerWalk(base.model), list[str]()
    found = measure_choices(walk, rows())
    sizes = []
    for increase in (0.0005, 0.01):
        plan, _ = mixed_plan(
            base, rows(), bits=None, max_perplexity_increase=increase, on_progress=lambda *what: said.append(what[2])
        )
        loss = loss_with(walk, plan, rows())
        assert math.exp(loss) <= math.exp(found.loss) * (1 + increase) * (1 + 1e-6)
        sizes.append(found.bits_of(plan))
    assert found.bounds()[0] <= sizes[1] < sizes[0] < 16
    assert any("sensitivity" in text for text in said) and any("bits: perplexity" in text for text in said)


@torch.no_grad()
def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = load(save("gemma3", tmp_path / "base"))
    walk, before = LayerWalk(base.model), dict(base.model.named_modules())
    found = measure_choices(walk, rows())
    plain = loss_with(walk, Plan({}), rows())
    assert plain == pytest.approx(found.loss, rel=1e-6)
    assert loss_with(walk, Plan.uniform(base.model, "fp4"), rows()) != plain
    assert dict(base.model.named_modules()) == before
    assert loss_with(walk, Plan({}), rows()) == plain


def test_missing_rows(tmp_path: Path) -> None:
    base = load(save("gemma3", tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"^calibration_data: 0 tokens"):
        mixed_plan(base, [], bits=5.0, max_perplexity_increase=None)
