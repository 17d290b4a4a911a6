"""Mixed precision: each linear the format that its weights are worth.

From the growth of the loss that each choice costs (`sensitivity.py`) and its bytes: the least growth within a budget
of bits, exactly (a knapsack with one choice for each linear); or the fewest bits whose measured perplexity on the rows
stays within a budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from alpaca_lora.device import Compute
from alpaca_lora.errors import ConfigError
from alpaca_lora.models.load import Base
from alpaca_lora.models.module_names import HEADS
from alpaca_lora.quantization.calibrate import Errors, OnProgress, pass_quantizing, quantize_layers, walk_source
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.layer_walk import LayerWalk, Rows, check_rows
from alpaca_lora.quantization.plan import DENSE, Plan, Shape, linear_shapes
from alpaca_lora.quantization.scheme import Scheme, scheme_class
from alpaca_lora.quantization.sensitivity import Growth, measure_sensitivity
from alpaca_lora.text.tokenizer import Tokenizer

# a group size that does not divide a linear is halved until it does; besides these a linear may stay dense
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int4", {"group_size": 128}), ("nf4", {}), ("int4", {"group_size": 32}), ("int8", {})
)  # fmt: skip
SMALLEST_GROUP = 8
DENSE_BITS = 16
UNITS = 2**16  # of the budget, in the knapsack
SEARCHES = 7  # halvings of the bits between the coarsest and the finest plan


@dataclass(frozen=True)
class Budget:
    """One of both. bits: the most stored bits per weight over all linears but the heads, those that stay dense too;
    max_perplexity_increase: 0.01 is one percent, measured on the rows.
    """

    bits: float | None = None
    max_perplexity_increase: float | None = None


@dataclass(frozen=True)
class Choices:
    """Of each linear: its candidates (None: dense, which also stands in the place of those that do not fit), the bits
    that each takes in all, the growth of the loss that it costs. loss: of the dense model, in nats per token.
    """

    schemes: Mapping[str, Sequence[Scheme | None]]
    bits: Mapping[str, Sequence[float]]
    growth: Growth
    shapes: Mapping[str, Shape]
    loss: float

    @property
    def num_weights(self) -> int:
        return sum(self.shapes[name][0] * self.shapes[name][1] for name in self.schemes)

    def bounds(self) -> tuple[float, float]:
        """Bits per weight of the smallest and of the largest choice everywhere."""
        low, high = (sum(pick(own) for own in self.bits.values()) / self.num_weights for pick in (min, max))
        return low, high

    def bits_of(self, plan: Plan) -> float:
        """Bits per weight that a plan takes of the linears here."""
        places = [(name, self.schemes[name].index(plan.schemes.get(name))) for name in self.schemes]
        return sum(self.bits[name][place] for name, place in places) / self.num_weights


def mixed_plan(
    base: Base, rows: Rows, *, bits: float | None, max_perplexity_increase: float | None, rounding: str = "nearest",
    on_progress: OnProgress | None = None,
) -> tuple[Plan, Table]:  # fmt: skip
    """The plan within the budget (see `Budget`) for a dense base, and what it rests on as a table. ``rounding``: how
    codes will be chosen.

    ConfigError when rows are missing or the budget cannot be met.
    """
    budget = Budget(bits, max_perplexity_increase)
    return find_plan(LayerWalk(base.model), rows, budget, rounding=rounding, on_progress=on_progress)


def quantize_source_mixed(
    path: Path, compute: Compute, budget: Budget, rows_of: Callable[[Tokenizer], Rows], *, rounding: str = "nearest",
    on_progress: OnProgress | None = None,
) -> tuple[Base, Plan, Errors, Table]:  # fmt: skip
    """`mixed_plan` and `calibrate.quantize_source` in one, of a file: the dense model never exists. The base that is
    returned has the dense file's fingerprint.
    """

    def work(walk: LayerWalk, tokenizer: Tokenizer) -> tuple[Plan, Errors, Table]:
        rows = rows_of(tokenizer)
        plan, table = find_plan(walk, rows, budget, rounding=rounding, on_progress=on_progress)
        return *quantize_layers(walk, plan, rows, rounding=rounding, on_progress=on_progress), table

    base, (plan, errors, table) = walk_source(path, compute, work)
    return base, plan, errors, table


def find_plan(
    walk: LayerWalk, rows: Rows, budget: Budget, *, rounding: str = "nearest", on_progress: OnProgress | None = None
) -> tuple[Plan, Table]:
    """As `mixed_plan`, of a model that is gone through layer by layer; its linears are dense afterwards as before."""
    check_rows(rows)
    rows = [row for row in rows if len(row) > 1]
    choices = measure_choices(walk, rows, rounding=rounding, on_progress=on_progress)

    def loss_of(plan: Plan) -> float:
        return loss_with(walk, plan, rows, rounding)

    if budget.bits is not None:
        plan = best_plan(choices, budget.bits)
        loss = loss_of(plan)
    else:
        assert budget.max_perplexity_increase is not None
        plan, loss = smallest_plan(choices, budget.max_perplexity_increase, loss_of, on_progress)
    return plan, _table(choices, plan, loss)


def measure_choices(
    walk: LayerWalk, rows: Rows, *, rounding: str = "nearest", on_progress: OnProgress | None = None
) -> Choices:
    """Candidates, bits and growth of every linear but the heads."""
    shapes = {n: shape for n, shape in linear_shapes(walk.model).items() if n.rpartition(".")[2] not in HEADS}
    schemes = {name: [_fitted(*one, shape) for one in CANDIDATES] for name, shape in shapes.items()}
    made = {name: [scheme for scheme in own if scheme is not None] for name, own in schemes.items()}
    growth, loss = measure_sensitivity(walk, made, rows, rounding=rounding, on_progress=on_progress)
    of_scheme = {name: dict(zip(made[name], own, strict=True)) for name, own in growth.items()}
    schemes = {name: [*own, None] for name, own in schemes.items()}
    return Choices(
        schemes,
        {name: [_stored_bits(one, shapes[name], rounding) for one in own] for name, own in schemes.items()},
        {name: [0.0 if one is None else of_scheme[name][one] for one in own] for name, own in schemes.items()},
        shapes, loss,
    )  # fmt: skip


def _fitted(kind: str, settings: Mapping[str, Any], shape: Shape) -> Scheme | None:
    """The candidate, its groups as large as fit a linear; None where none do."""
    scheme: Any = scheme_class(kind).make(settings)
    while True:
        try:
            scheme.parts(*shape)
            return scheme
        except ConfigError:
            if getattr(scheme, "group_size", 0) < 2 * SMALLEST_GROUP:
                return None
            scheme = dataclasses.replace(scheme, group_size=scheme.group_size // 2)


def _stored_bits(scheme: Scheme | None, shape: Shape, rounding: str) -> float:
    if scheme is None:
        return float(DENSE_BITS * math.prod(shape))
    if rounding == "awq" and isinstance(scheme, Int4):
        scheme = dataclasses.replace(scheme, input_scales=True)
    return scheme.bits_per_weight(*shape) * math.prod(shape)


def best_plan(choices: Choices, bits: float) -> Plan:
    """The choice of one scheme for each linear with the least growth in all, within ``bits`` per weight. ConfigError
    when that is too few, or so many that all stays dense.
    """
    least, most = choices.bounds()
    if not least <= bits < most:
        raise ConfigError(
            f"{bits:g} bits per weight cannot be reached" if bits < least else f"{bits:g} bits quantize nothing",
            field="bits", expected=f"at least {least:.3f} and less than {most:g}",
        )  # fmt: skip
    names = list(choices.schemes)
    picked = knapsack(
        [choices.bits[name] for name in names], [choices.growth[name] for name in names], bits * choices.num_weights
    )
    chosen = {name: choices.schemes[name][place] for name, place in zip(names, picked, strict=True)}
    return Plan({name: scheme for name, scheme in chosen.items() if scheme is not None})


def knapsack(sizes: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One choice for each item with the least cost in all, such that the sizes come to ``budget`` at most.

    Dynamic programming over the budget above the smallest choices, in units: the greatest common divisor of what the
    choices take, or where that makes more than `UNITS`, so many. Then sizes are rounded up: the budget holds, and what
    it leaves unused is at most one unit for each item.
    """
    smallest = [min(own) for own in sizes]
    room = budget - sum(smallest)
    assert room >= -1e-9 * abs(budget), "the smallest choices do not fit"
    extra = [[size - least for size in own] for own, least in zip(sizes, smallest, strict=True)]
    divisor = math.gcd(*(round(size) for own in extra for size in own))
    unit, num_units = float(max(divisor, 1)), max(math.floor(room / max(divisor, 1) + 1e-9), 0)
    if num_units > UNITS or any(size != round(size) for own in extra for size in own):
        unit, num_units = max(room, 1e-12) / UNITS, UNITS
    taken = [[math.ceil(size / unit - 1e-9) for size in own] for own in extra]
    best = np.zeros(num_units + 1)
    picks = np.zeros((len(sizes), num_units + 1), dtype=np.int8)
    for item, cost in enumerate(costs):
        found = np.full(num_units + 1, np.inf)
        for place, price in enumerate(cost):
            if (units := taken[item][place]) > num_units:
                continue
            offer = best[: num_units + 1 - units] + price
            better = offer < found[units:]
            found[units:][better], picks[item][units:][better] = offer[better], place
        best = found
    left, chosen = num_units, list[int]()
    for item in range(len(sizes) - 1, -1, -1):
        place = int(picks[item][left])
        chosen.append(place)
        left -= taken[item][place]
    return chosen[::-1]


def smallest_plan(
    choices: Choices, increase: float, loss_of: Callable[[Plan], float], on_progress: OnProgress | None = None
) -> tuple[Plan, float]:
    """(the plan with the fewest bits whose measured loss is within the budget, that loss). Halves the bits between the
    coarsest and the finest plan; a larger plan is taken to be no worse, a plan that is returned was measured.
    """
    allowed = choices.loss + math.log1p(increase)
    low, high = choices.bounds()
    best: tuple[Plan, float] | None = None
    bits = low  # when the coarsest plan will do, nothing is searched
    for number in range(SEARCHES + 1):
        plan = best_plan(choices, bits)
        loss = loss_of(plan)
        if on_progress is not None:
            on_progress(number + 1, SEARCHES + 1, f"{bits:.2f} bits: perplexity {math.exp(loss):.3f}")
        if loss <= allowed:
            best, high = (plan, loss), bits
        else:
            low = bits
        if high <= low:
            break
        bits = (low + high) / 2
    if best is None:
        raise ConfigError(
            f"plans of up to {low:.2f} bits raise the perplexity to {math.exp(loss):.3f} and more",  # pyright: ignore
            field="max_perplexity_increase", expected=f"more than {math.expm1(loss - choices.loss):.4f}",  # pyright: ignore
        )  # fmt: skip
    return best


@torch.no_grad()
def loss_with(walk: LayerWalk, plan: Plan, rows: Rows, rounding: str = "nearest") -> float:
    """Mean of -log p (nats) over the rows' tokens but each row's first, of the model as the plan makes it; the model is
    as it was afterwards.
    """
    dense = {name: walk.model.get_submodule(name) for name in plan.schemes}
    streams = walk.streams(rows)
    try:
        pass_quantizing(walk, plan, streams, rounding=rounding)
        total = sum(float(walk.loss(stream, stream.x_TD)) for stream in streams)
    finally:
        for name, linear in dense.items():
            walk.put(name, linear)
        for index in range(len(walk)):
            walk.empty(index)
    return total / sum(len(row) - 1 for row in rows)


def _table(choices: Choices, plan: Plan, loss: float) -> Table:
    """Linears by kind: mean growth for each candidate and how many got it; perplexities in the title."""
    title = (
        "sensitivity: growth of the loss in nats per token if one linear alone is quantized; how many got the scheme\n"
        f"perplexity on the calibration rows: {math.exp(choices.loss):.3f} dense, {math.exp(loss):.3f} at "
        f"{choices.bits_of(plan):.3f} bits per weight"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("linears")
    for scheme, settings in CANDIDATES:
        table.add_column(" ".join([scheme, *(f"{key} {value}" for key, value in settings.items())]), justify="right")
    table.add_column(DENSE, justify="right")
    kinds: dict[str, list[str]] = {}
    for name in choices.schemes:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in kinds.items():
        cells = []
        for place in range(len(CANDIDATES) + 1):
            mean = sum(choices.growth[name][place] for name in names) / len(names)
            got = sum(plan.schemes.get(name) == choices.schemes[name][place] for name in names)
            cells.append(f"{mean:.2e} ({got})")
        table.add_row(kind, *cells)
    return table
