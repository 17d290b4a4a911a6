"""Mixed precision: each linear the format that its weights are worth.

From the growth of the loss that each choice costs (`sensitivity.py`) and its bytes: the least growth within a budget
of bits, exactly (a knapsack with one choice for each linear); or the fewest bits whose measured perplexity on the rows
stays within a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from alpaca_lora.errors import ConfigError
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.calibrate import LEAST_TOKENS
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan, Shape, linear_shapes
from alpaca_lora.quantization.scheme import Scheme
from alpaca_lora.quantization.sensitivity import Growth, mean_loss, measure_sensitivity

# coarse to fine; a group size that does not divide a linear is halved until it does
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int4", {}), ("nf4", {}), ("int4", {"group_size": 32}), ("int8", {})
)  # fmt: skip
UNITS = 8192  # of the budget, in the knapsack
SEARCHES = 7  # halvings of the bits between the coarsest and the finest plan

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Choices:
    """Of each linear: its candidate schemes, their bits in all, the growth of the loss that each costs."""

    schemes: Mapping[str, Sequence[Scheme]]
    bits: Mapping[str, Sequence[float]]
    growth: Growth
    shapes: Mapping[str, Shape]

    @property
    def num_weights(self) -> int:
        return sum(self.shapes[name][0] * self.shapes[name][1] for name in self.schemes)

    def bounds(self) -> tuple[float, float]:
        """Bits per weight of the smallest and of the largest choice everywhere."""
        return tuple(sum(pick(own) for own in self.bits.values()) / self.num_weights for pick in (min, max))  # pyright: ignore


def mixed_plan(
    base: Base, rows: Sequence[torch.Tensor], *, bits: float | None, max_perplexity_increase: float | None,
    on_progress: OnProgress | None = None,
) -> tuple[Plan, Table]:  # fmt: skip
    """The plan within the budget for a dense base, and what it rests on as a table. ``bits``: stored bits per weight
    over all linears but the heads; ``max_perplexity_increase``: 0.01 is one percent, measured on the rows.

    ConfigError when rows are missing or the budget cannot be met.
    """
    if sum(map(len, rows)) < LEAST_TOKENS:
        raise ConfigError(
            f"{sum(map(len, rows))} tokens to calibrate on", field="calibration_data",
            expected=f"at least {LEAST_TOKENS} tokens",
        )  # fmt: skip
    rows = [row for row in rows if len(row) > 1]
    say = on_progress or (lambda done, total, what: None)
    choices = measure_choices(base, rows, lambda done, total: say(done, total, "sensitivity of each layer"))
    if bits is not None:
        plan = best_plan(choices, bits)
    else:
        assert max_perplexity_increase is not None
        plan = _smallest_plan(base, choices, rows, max_perplexity_increase, say)
    return plan, _table(base, choices, plan, rows)


def measure_choices(base: Base, rows: Sequence[torch.Tensor], on_row: Callable[[int, int], None] | None) -> Choices:
    """Candidates, bits and growth of every linear but the heads."""
    plans = [Plan.uniform(base.model, scheme, settings) for scheme, settings in CANDIDATES]
    shapes = linear_shapes(base.model)
    schemes = {name: tuple(dict.fromkeys(plan.schemes[name] for plan in plans)) for name in plans[0].schemes}
    bits = {
        name: [one.bits_per_weight(*shapes[name]) * shapes[name][0] * shapes[name][1] for one in own]
        for name, own in schemes.items()
    }
    return Choices(schemes, bits, measure_sensitivity(base.model, schemes, rows, on_row), shapes)


def best_plan(choices: Choices, bits: float) -> Plan:
    """The choice of one scheme for each linear with the least growth in all, within ``bits`` per weight."""
    least, most = choices.bounds()
    if bits < least:
        raise ConfigError(
            f"{bits:g} bits per weight cannot be reached", field="bits", expected=f"at least {least:.3f}",
            fix=f"the finest choice everywhere takes {most:.2f}",
        )  # fmt: skip
    names = list(choices.schemes)
    picked = knapsack(
        [choices.bits[name] for name in names], [choices.growth[name] for name in names], bits * choices.num_weights
    )
    return Plan({name: choices.schemes[name][place] for name, place in zip(names, picked, strict=True)})


def knapsack(sizes: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One choice for each item with the least cost in all, such that the sizes come to ``budget`` at most.

    Dynamic programming over the budget above the smallest choices, cut into `UNITS`; what a choice takes is rounded up
    to whole ones, so the budget holds.
    """
    smallest = [min(own) for own in sizes]
    room = budget - sum(smallest)
    assert room >= -1e-9 * abs(budget), "the smallest choices do not fit"
    unit = max(room, 1e-12) / UNITS
    best = np.zeros(UNITS + 1)
    picks = np.zeros((len(sizes), UNITS + 1), dtype=np.int16)
    for item, (own, cost) in enumerate(zip(sizes, costs, strict=True)):
        found = np.full(UNITS + 1, np.inf)
        for place, (size, price) in enumerate(zip(own, cost, strict=True)):
            taken = math.ceil((size - smallest[item]) / unit - 1e-9)
            if taken > UNITS:
                continue
            offer = np.full(UNITS + 1, np.inf)
            offer[taken:] = best[: UNITS + 1 - taken] + price
            better = offer < found
            found[better], picks[item][better] = offer[better], place
        best = found
    left, chosen = UNITS, list[int]()
    for item in range(len(sizes) - 1, -1, -1):
        place = int(picks[item][left])
        chosen.append(place)
        left -= math.ceil((sizes[item][place] - smallest[item]) / unit - 1e-9)
    return chosen[::-1]


def _smallest_plan(
    base: Base, choices: Choices, rows: Sequence[torch.Tensor], increase: float, say: OnProgress
) -> Plan:  # fmt: skip
    """The plan with the fewest bits whose perplexity on the rows, measured, is within the budget."""
    allowed = mean_loss(base.model, rows) + math.log1p(increase)
    low, high = choices.bounds()
    best: Plan | None = None
    for number in range(SEARCHES + 1):
        bits = high if number == 0 else (low + high) / 2
        plan = best_plan(choices, bits)
        loss = loss_with(base, plan, rows)
        say(number + 1, SEARCHES + 1, f"{bits:.2f} bits: perplexity {math.exp(loss):.3f}")
        if loss <= allowed:
            best, high = plan, bits
        elif number == 0:
            raise ConfigError(
                f"even {bits:.2f} bits raise the perplexity to {math.exp(loss):.3f}", field="max_perplexity_increase",
                expected=f"at least {math.expm1(loss - allowed + math.log1p(increase)):.4f}",
            )  # fmt: skip
        else:
            low = bits
    assert best is not None
    return best


def loss_with(base: Base, plan: Plan, rows: Sequence[torch.Tensor]) -> float:
    """`mean_loss` of the model as the plan would make it; the model is as it was afterwards."""
    dense = {name: base.model.get_submodule(name) for name in plan.schemes}
    try:
        for name, linear in dense.items():
            _put(base, name, QuantizedLinear.from_dense(linear, plan.schemes[name], name=name))
        return mean_loss(base.model, rows)
    finally:
        for name, linear in dense.items():
            _put(base, name, linear)


def _put(base: Base, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(base.model.get_submodule(parent), leaf, module)


def _table(base: Base, choices: Choices, plan: Plan, rows: Sequence[torch.Tensor]) -> Table:
    """Linears by kind: mean growth for each candidate and how many got it; perplexities in the title."""
    dense, mixed = (math.exp(loss) for loss in (mean_loss(base.model, rows), loss_with(base, plan, rows)))
    title = (
        "sensitivity: growth of the loss in nats per token if one linear alone is quantized; how many got the scheme\n"
        f"perplexity on the calibration rows: {dense:.3f} dense, {mixed:.3f} at "
        f"{plan.bits_per_weight(choices.shapes):.3f} bits per weight"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("linears")
    for scheme, settings in CANDIDATES:
        table.add_column(" ".join([scheme, *(f"{key} {value}" for key, value in settings.items())]), justify="right")
    kinds: dict[str, list[str]] = {}
    for name in choices.schemes:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in kinds.items():
        cells = []
        for place in range(len(CANDIDATES)):
            own = [name for name in names if place < len(choices.schemes[name])]
            mean = sum(choices.growth[name][place] for name in own) / max(1, len(own))
            got = sum(plan.schemes[name] == choices.schemes[name][place] for name in own)
            cells.append(f"{mean:.2e} ({got})")
        table.add_row(kind, *cells)
    return table
