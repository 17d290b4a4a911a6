"""What the picture of ranks shows is what the log says."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from alpaca_lora.training.rank_picture import GONE, MOST_STEPS, rank_figure, rank_table

LOG: list[dict[str, Any]] = [
    {"step": 1, "budget": 8, "ranks": {"m.layers.10.q": 4, "m.layers.2.q": 4, "m.layers.2.v": 4, "head": 4}},
    {"step": 2, "budget": 8},
    {"step": 2, "val_loss": 1.0},
    {"step": 3, "budget": 6, "ranks": {"m.layers.2.q": 2, "head": 1}},
    {"step": 5, "budget": 5, "ranks": {"m.layers.2.q": 3, "m.layers.2.v": 0}},
    {"step": 7, "budget": 5},
]


def meshes(figure: Figure) -> dict[str, QuadMesh]:
    """Title of a panel -> its heat map."""
    found = {}
    for axes in figure.axes:
        for mesh in axes.collections:
            if isinstance(mesh, QuadMesh) and axes.get_title(loc="left"):
                found[axes.get_title(loc="left")] = mesh
    return found


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def test_ranks_stay_until_a_record_changes_them() -> None:
    steps, ranks = rank_table(LOG)
    assert steps == [1, 3, 5]
    assert ranks == {
        "m.layers.10.q": [4, 4, 4], "m.layers.2.q": [4, 2, 3], "m.layers.2.v": [4, 4, 0], "head": [4, 1, 1]
    }  # fmt: skip


def test_each_kind_of_module_is_a_panel_with_its_layers_in_order() -> None:
    figure = rank_figure(LOG)
    assert figure is not None
    panels = meshes(figure)
    assert set(panels) == {"q", "v", "head"}
    assert np.asarray(panels["q"].get_array()).tolist() == [[4, 2, 3], [4, 4, 4]]  # layer 2 before layer 10
    axes = panels["q"].axes
    assert axes is not None and [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    edges = panels["q"].get_coordinates()[0, :, 0]
    assert edges.tolist() == [0.5, 2.5, 4.5, 7.5]  # to the end of the run
    assert png(figure).startswith(b"\x89PNG")


def test_no_rank_has_a_colour_of_its_own() -> None:
    figure = rank_figure(LOG)
    assert figure is not None
    mesh = meshes(figure)["v"]
    png(figure)
    colors = [to_hex(mesh.to_rgba(np.array([rank]))[0]) for rank in range(5)]
    assert colors[0] == GONE and len(set(colors)) == 5


def test_the_sum_of_ranks_and_the_budget_are_drawn() -> None:
    figure = rank_figure(LOG)
    assert figure is not None
    budget, total = figure.axes[0].lines
    assert np.asarray(total.get_xydata()).tolist() == [[1, 16], [3, 11], [5, 8], [7, 8]]
    assert np.asarray(budget.get_ydata()).tolist() == [8, 8, 6, 5, 5]


def test_kinds_that_end_alike_are_told_apart() -> None:
    figure = rank_figure([{"step": 1, "ranks": {"a.0.proj": 1, "b.0.proj": 2, "0": 3, "2": 1}}])
    assert figure is not None and set(meshes(figure)) == {"a.*.proj", "b.*.proj", "modules"}


def test_without_ranks_there_is_no_picture() -> None:
    assert rank_figure([{"step": 1, "train_loss": 2.0}]) is None and rank_figure([]) is None


def test_a_long_run_is_thinned_out_to_its_first_and_last_steps() -> None:
    log = [{"step": step, "ranks": {"a": step % 7}} for step in range(1, 3 * MOST_STEPS)]
    figure = rank_figure(log)
    assert figure is not None
    shown = np.asarray(meshes(figure)["a"].get_array())[0]
    assert len(shown) <= MOST_STEPS + 1 and shown[0] == 1 and shown[-1] == (3 * MOST_STEPS - 1) % 7
