"""The rank of every module over the steps of a run as a picture; knows the records of metrics.jsonl only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GONE = "#d9d9d9"  # rank 0: the module is its base alone
LINE, FAINT = "#2f6fde", "#d9822b"
COLUMNS = 2
MOST_COLORS = 24  # more ranks than eyes tell apart share a colour
MOST_STEPS = 1200  # more than there are pixels take seconds to draw


def rank_figure(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A heat map for each kind of module (layers from top to bottom, steps from left to right), the sum of all ranks
    above; None when no record holds ranks.

    ``log``: records with ``step``, and at steps that changed ranks ``ranks``: module -> rank, of those that changed.
    """
    steps, ranks = rank_table(log)
    if not steps:
        return None
    last = max(record["step"] for record in log)
    apart = math.ceil(len(steps) / MOST_STEPS)
    shown = sorted({*range(0, len(steps), apart), len(steps) - 1})  # the first and the last are always among them
    steps, ranks = [steps[i] for i in shown], {name: [values[i] for i in shown] for name, values in ranks.items()}
    edges = np.array([*steps, last + 1]) - 0.5
    kinds = _kinds(list(ranks))
    rows = math.ceil(len(kinds) / COLUMNS)
    heights = [
        max(len(layers) for layers in list(kinds.values())[COLUMNS * row : COLUMNS * (row + 1)]) for row in range(rows)
    ]
    inches = [0.5 + min(0.16 * height, 2.2) for height in heights]
    figure = Figure(figsize=(10, 2.2 + sum(inches)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[1.5, *inches])
    _draw_sum(figure.add_subplot(grid[0, :]), log, steps, ranks, last)
    most = max(max(values) for values in ranks.values())
    axes = [figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]) for i in range(len(kinds))]
    mesh = None
    for one, (kind, layers) in zip(axes, kinds.items(), strict=True):
        table = np.array([ranks[name] for name in layers.values()])
        mesh = _draw_kind(one, kind, list(layers), table, edges, most)
    for one in axes[-COLUMNS:]:
        one.set_xlabel("optimizer step")
    bar = figure.colorbar(mesh, ax=axes, label="rank", shrink=0.9)  # pyright: ignore[reportArgumentType]
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    bar.ax.minorticks_off()
    return figure


def rank_table(log: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[int]]]:
    """(steps at which ranks changed, module -> its rank from each of them on)."""
    steps: list[int] = []
    ranks: dict[str, list[int]] = {}
    for record in log:
        if not (news := record.get("ranks")):
            continue
        if not steps:
            ranks = {name: [] for name in news}
        steps.append(record["step"])
        for name, values in ranks.items():
            values.append(news[name] if name in news else values[-1])
    return steps, ranks


def _kinds(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Label of a kind -> number of the layer -> name of the module, layers in order.

    A kind is what modules share besides the first number in their names; its label is the end of that, as short as it
    tells kinds apart.
    """
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        kind = tuple(parts) if at is None else (*parts[:at], "*", *parts[at + 1 :])
        found.setdefault(kind, {})[-1 if at is None else int(parts[at])] = name
    labels: dict[str, dict[str, str]] = {}
    for kind, layers in found.items():
        size = next(n for n in range(1, len(kind) + 1) if sum(other[-n:] == kind[-n:] for other in found) == 1)
        label = "modules" if kind == ("*",) else ".".join(kind[-size:])  # those of a plain nn.Sequential
        labels[label] = {str(layer) if layer >= 0 else "": layers[layer] for layer in sorted(layers)}
    return labels


def _draw_sum(
    axes: Axes, log: Sequence[Mapping[str, Any]], steps: Sequence[int], ranks: Mapping[str, Sequence[int]], last: int
) -> None:
    totals = [sum(values[i] for values in ranks.values()) for i in range(len(steps))]
    budget = [(record["step"], record["budget"]) for record in log if "budget" in record]
    if budget:
        axes.step(*zip(*budget, strict=True), where="post", color=FAINT, linewidth=3, alpha=0.5, label="budget")
    axes.step([*steps, last], [*totals, totals[-1]], where="post", color=LINE, linewidth=1.4, label="sum of ranks")
    axes.set_xlim(steps[0] - 0.5, last + 0.5)
    axes.set_ylim(0, 1.08 * max(totals))
    axes.set_ylabel("all modules")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", ncols=2)


def _draw_kind(axes: Axes, kind: str, layers: Sequence[str], table: np.ndarray, edges: np.ndarray, most: int) -> Any:
    """One heat map; ``table`` (layers, steps) of ranks, rank 0 in grey."""
    levels = np.unique(np.linspace(1, most + 1, min(most, MOST_COLORS) + 1).round()) - 0.5
    colors = colormaps["viridis"](np.linspace(0, 1, max(2, len(levels) - 1)))[: len(levels) - 1]
    norm = BoundaryNorm([-0.5, *levels], len(levels))
    mesh = axes.pcolormesh(
        edges, np.arange(len(layers) + 1) - 0.5, table, cmap=ListedColormap([GONE, *colors]), norm=norm
    )
    axes.invert_yaxis()
    apart = max(1, math.ceil(len(layers) / 8))
    ticks = range(0, len(layers), apart)
    axes.set_yticks(ticks, [layers[i] for i in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(kind, fontsize=10, loc="left")
    if any(layers):
        axes.set_ylabel("layer")
    return mesh
