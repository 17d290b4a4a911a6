"""report.html: one page, nothing fetched, that says what a run did. Knows numbers and texts that it is given.

The loss curve and the modules' updates are pictures (matplotlib, in the page as PNG); texts are escaped by jinja2.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alpaca_lora.training.durable import replace_file

SMOOTHING = 0.9  # share of the running mean that stays from one step to the next
TRAIN, VALIDATION, FAINT = "#2f6fde", "#d9822b", "#b9c7de"


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """A question of the rows, the answer that the row wants, and what the tuned model says."""

    question: str
    wanted: str
    answer: str


@dataclass(frozen=True)
class Report:
    """What the page shows. summary, config: (name, value, note); log: the records of metrics.jsonl; moved: module ->
    norm of its update; rows: the ledger's (what, how many, note); method: what the method did (name, value); pictures:
    (heading, picture), for example ranks over time or a confusion matrix; loss_per: what the loss is a mean over."""

    title: str
    summary: Sequence[tuple[str, str, str]]
    log: Sequence[Mapping[str, Any]]
    config: Sequence[tuple[str, str, str]]
    rows: Sequence[tuple[str, int, str]]
    moved: Mapping[str, float]
    samples: Sequence[SampleAnswer] = field(default_factory=list)
    method: Sequence[tuple[str, str]] = ()
    pictures: Sequence[tuple[str, Figure]] = ()
    loss_per: Literal["token", "row"] = "token"


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically."""
    source = resources.files("alpaca_lora.training").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(source)
    text = page.render(
        report=report, loss_picture=_png(loss_figure(report.log, report.loss_per)), moved_picture=_moved(report.moved),
        pictures=[(heading, _png(figure)) for heading, figure in report.pictures],
    )  # fmt: skip
    replace_file(path, text.encode())


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean with the bias of its start taken out, as Adam does it."""
    mean, result = 0.0, []
    for step, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        result.append(mean / (1 - SMOOTHING**step))
    return result


def loss_figure(log: Sequence[Mapping[str, Any]], loss_per: str = "token") -> Figure:
    """Training loss of each step, its running mean, validation loss; the learning rate below. ``loss_per``: what the
    loss is a mean over.
    """
    train = [(r["step"], r["train_loss"], r["learning_rate"]) for r in log if "train_loss" in r]
    validation = [(r["step"], r["val_loss"]) for r in log if "val_loss" in r]
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if train:
        steps, losses, rates = zip(*train, strict=True)
        upper.plot(steps, losses, color=FAINT, linewidth=1, label="training, each step")
        upper.plot(steps, smoothed(losses), color=TRAIN, linewidth=1.8, label="training, running mean")
        lower.plot(steps, rates, color=TRAIN, linewidth=1.2)
    if validation:
        steps, losses = zip(*validation, strict=True)
        upper.plot(steps, losses, color=VALIDATION, marker="o", markersize=4, linewidth=1.5, label="validation")
    upper.set_ylabel(f"loss per {loss_per} (nats)")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        upper.legend(frameon=False)
    return figure


def moved_figure(moved: Mapping[str, float]) -> Figure:
    """Norm of each module's update: a row for each kind of module, a column for each layer."""
    cells: dict[str, dict[int, float]] = {}
    for name, norm in moved.items():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        cells.setdefault(parts[-1], {})[layer] = norm
    depth = 1 + max(layer for row in cells.values() for layer in row)
    grid = [[row.get(layer, float("nan")) for layer in range(depth)] for row in cells.values()]
    figure = Figure(figsize=(9, max(1.9, 0.8 + 0.4 * len(grid))), dpi=110, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_xlabel("layer")
    figure.colorbar(picture, ax=axes, label="norm of the change")
    return figure


def _moved(moved: Mapping[str, float]) -> str | None:
    return _png(moved_figure(moved)) if moved else None


def _png(figure: Figure) -> str:
    """The figure as base64 for a data: address."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()
