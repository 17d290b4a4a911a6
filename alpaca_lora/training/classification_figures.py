"""How well classes are told apart: figures of a confusion matrix, and the matrix as a table and as a picture.

Pure functions of counts; knows no model. confusion_CC[i, j]: rows of class i that were given class j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

MAX_MATRIX = 12  # classes up to which the matrix is shown with its numbers; above, the commonest confusions
MAX_KEPT = 100  # classes up to which the matrix is among the figures: each evaluation's line of the log holds them

Matrix = np.ndarray | Sequence[Sequence[int]]


def confusion_matrix(
    predicted_N: np.ndarray | Sequence[int], actual_N: np.ndarray | Sequence[int], num_classes: int
) -> np.ndarray:
    """int64 confusion_CC."""
    confusion_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion_CC, (np.asarray(actual_N, dtype=np.int64), np.asarray(predicted_N, dtype=np.int64)), 1)
    return confusion_CC


def accuracy(confusion_CC: np.ndarray) -> float:
    """Share of the rows that were given their class; 0 without rows."""
    return float(np.trace(confusion_CC) / max(1, confusion_CC.sum()))


def precision_recall_f1(confusion_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision_C, recall_C, f1_C), float64; 0 where nothing can be divided by.

    precision = right / given the class, recall = right / of the class, F1 = 2 right / (given + of).
    """
    right_C = np.diagonal(confusion_CC).astype(float)
    given_C, of_C = confusion_CC.sum(0), confusion_CC.sum(1)
    return (
        right_C / np.maximum(1, given_C),
        right_C / np.maximum(1, of_C),
        2 * right_C / np.maximum(1, given_C + of_C),
    )


def macro_f1(confusion_CC: np.ndarray) -> float:
    """Mean F1 of the classes that occur, as actual or as predicted ones; 0 without rows."""
    occurs_C = confusion_CC.sum(0) + confusion_CC.sum(1) > 0
    return float(precision_recall_f1(confusion_CC)[2][occurs_C].mean()) if occurs_C.any() else 0.0


def matthews(confusion_CC: np.ndarray) -> float:
    """Matthews correlation of any number of classes, -1 to 1; 0 for guessing, and where it is not defined because all
    rows are of one class or are given one.

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)) with c right of s rows, p_k rows given class k
    and t_k rows of it. Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    given_C, of_C = ([int(n) for n in confusion_CC.sum(axis)] for axis in (0, 1))  # squares of large counts: exact
    num_right, num_rows = int(np.trace(confusion_CC)), int(confusion_CC.sum())
    covariance = num_right * num_rows - sum(p * t for p, t in zip(given_C, of_C, strict=True))
    spreads = [num_rows**2 - sum(n * n for n in counts) for counts in (given_C, of_C)]
    return covariance / math.sqrt(spreads[0] * spreads[1]) if all(spreads) else 0.0


def describe(confusion_CC: np.ndarray) -> dict[str, Any]:
    """JSON values: accuracy, macro_f1, matthews, and of up to MAX_KEPT classes the matrix itself as ``confusion``."""
    figures: dict[str, Any] = {
        "accuracy": accuracy(confusion_CC), "macro_f1": macro_f1(confusion_CC), "matthews": matthews(confusion_CC)
    }  # fmt: skip
    return figures | ({"confusion": confusion_CC.tolist()} if len(confusion_CC) <= MAX_KEPT else {})


def class_table(confusion: Matrix, labels: Sequence[str]) -> Table:
    """Precision, recall, F1 and rows of each class, and the figures over all."""
    confusion_CC = np.asarray(confusion)
    title = "accuracy {accuracy:.2%}, macro-F1 {macro_f1:.4f}, Matthews {matthews:.4f}".format(**describe(confusion_CC))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "F1", "rows"):
        table.add_column(name, justify="right")
    columns = precision_recall_f1(confusion_CC)
    for label, *shares, support in zip(labels, *columns, confusion_CC.sum(1), strict=True):
        table.add_row(escape(label), *(f"{share:.4f}" for share in shares), f"{support:,}")
    return table


def confusion_table(confusion: Matrix, labels: Sequence[str]) -> Table:
    """The matrix: a row for each actual class, a column for each class given; of more than MAX_MATRIX classes the
    commonest confusions.
    """
    confusion_CC = np.asarray(confusion)
    if len(labels) > MAX_MATRIX:
        return _commonest(confusion_CC, labels)
    title = "rows of a class (left) that were given a class (above)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
    table.add_column("", style="dim", overflow="fold")
    for label in labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    for actual, counts_C in enumerate(confusion_CC):
        cells = [f"[bold green]{n:,}[/]" if actual == given else f"{n:,}" for given, n in enumerate(counts_C)]
        table.add_row(escape(labels[actual]), *cells)
    return table


def _commonest(confusion_CC: np.ndarray, labels: Sequence[str]) -> Table:
    wrong_CC = confusion_CC * (1 - np.eye(len(labels), dtype=np.int64))
    table = Table(title="commonest confusions", title_justify="left", box=None, pad_edge=False)
    for name in ("class", "given instead"):
        table.add_column(name, overflow="fold")
    table.add_column("rows", justify="right")
    for at in np.argsort(-wrong_CC, axis=None, kind="stable")[:MAX_MATRIX]:
        actual, given = divmod(int(at), len(labels))
        if wrong_CC[actual, given]:
            table.add_row(escape(labels[actual]), escape(labels[given]), f"{wrong_CC[actual, given]:,}")
    return table


def confusion_figure(confusion: Matrix, labels: Sequence[str]) -> Figure:
    """The matrix as a picture: colours are shares of the actual class, numbers are rows."""
    labels = [_shortened(label) for label in labels]
    confusion_CC = np.asarray(confusion)
    share_CC = confusion_CC / np.maximum(1, confusion_CC.sum(1, keepdims=True))
    num_classes = len(labels)
    side = min(12.0, 2.6 + 0.55 * num_classes)
    figure = Figure(figsize=(side + 1.2, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    size = min(10.0, max(4.0, 240 / num_classes))
    upright = 90 if max(map(len, labels)) * num_classes > 30 else 0
    axes.set_xticks(range(num_classes), labels, rotation=upright, fontsize=size)
    axes.set_yticks(range(num_classes), labels, fontsize=size)
    axes.set_xlabel("given class")
    axes.set_ylabel("class")
    axes.set_title("accuracy {accuracy:.2%}, macro-F1 {macro_f1:.3f}".format(**describe(confusion_CC)), fontsize=10)
    if num_classes <= MAX_MATRIX:
        for (actual, given), count in np.ndenumerate(confusion_CC):
            colour = "white" if share_CC[actual, given] > 0.55 else "black"
            axes.text(given, actual, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(picture, ax=axes, label="share of the class", shrink=0.8)
    return figure


def _shortened(label: str, size: int = 24) -> str:
    shown = label if len(label) <= size else label[: size - 1] + "…"
    return shown.replace("$", r"\$")  # matplotlib takes it for mathematics
