"""Figures of a confusion matrix, against their definitions and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from alpaca_lora.training.classification_figures import (
    MAX_KEPT,
    accuracy,
    class_table,
    confusion_figure,
    confusion_matrix,
    confusion_table,
    describe,
    macro_f1,
    matthews,
    precision_recall_f1,
)


def random_classes(seed: int, num_classes: int, num_rows: int = 200) -> tuple[list[int], list[int]]:
    """(predicted, actual), more often right than not, classes of very different size."""
    random = np.random.default_rng(seed)
    actual = random.choice(num_classes, num_rows, p=random.dirichlet(np.ones(num_classes)))
    predicted = np.where(random.random(num_rows) < 0.6, actual, random.integers(0, num_classes, num_rows))
    return predicted.tolist(), actual.tolist()


def shown(table) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


def test_a_matrix_by_hand() -> None:
    predicted, actual = [0, 0, 1, 2, 1, 0], [0, 1, 1, 2, 0, 0]
    matrix = confusion_matrix(predicted, actual, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert accuracy(matrix) == pytest.approx(4 / 6)
    precision, recall, f1 = precision_recall_f1(matrix)
    assert precision == pytest.approx([2 / 3, 1 / 2, 1, 0]) and recall == pytest.approx([2 / 3, 1 / 2, 1, 0])
    assert f1 == pytest.approx([2 / 3, 1 / 2, 1, 0])
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)  # class 3 does not occur
    # c s - sum p t = 4 * 6 - (9 + 4 + 1) = 10; s^2 - sum p^2 = 36 - 14 = 22, twice
    assert matthews(matrix) == pytest.approx(10 / 22)


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_have_the_formula_of_matthews_himself(seed: int) -> None:
    predicted, actual = random_classes(seed, 2)
    pairs = list(zip(predicted, actual, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(confusion_matrix(predicted, actual, 2)) == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_matthews_is_the_correlation_of_the_indicators(num_classes: int) -> None:
    predicted, actual = random_classes(num_classes, num_classes)
    x, y = (np.eye(num_classes)[numbers] for numbers in (predicted, actual))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(confusion_matrix(predicted, actual, num_classes)) == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_f1_is_the_harmonic_mean_of_what_is_counted(num_classes: int) -> None:
    predicted, actual = random_classes(num_classes + 10, num_classes)
    scores = []
    for number in range(num_classes):
        given = [a for p, a in zip(predicted, actual, strict=True) if p == number]
        own = [p for p, a in zip(predicted, actual, strict=True) if a == number]
        if not given and not own:
            continue
        precision, recall = given.count(number) / max(1, len(given)), own.count(number) / max(1, len(own))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert macro_f1(confusion_matrix(predicted, actual, num_classes)) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_scikit_learn_agrees(num_classes: int) -> None:
    from sklearn import metrics

    predicted, actual = random_classes(num_classes + 20, num_classes)
    matrix = confusion_matrix(predicted, actual, num_classes)
    assert matrix.tolist() == metrics.confusion_matrix(actual, predicted, labels=range(num_classes)).tolist()
    assert accuracy(matrix) == pytest.approx(metrics.accuracy_score(actual, predicted))
    assert macro_f1(matrix) == pytest.approx(metrics.f1_score(actual, predicted, average="macro"))
    assert matthews(matrix) == pytest.approx(metrics.matthews_corrcoef(actual, predicted))


def test_what_cannot_be_divided_is_zero() -> None:
    assert matthews(confusion_matrix([0, 0, 0], [0, 1, 0], 2)) == 0  # all rows given one class
    assert matthews(confusion_matrix([0, 1], [0, 0], 2)) == 0  # all rows of one class
    assert matthews(confusion_matrix([1, 0], [0, 1], 2)) == -1 and matthews(confusion_matrix([0, 1], [0, 1], 2)) == 1
    empty = confusion_matrix([], [], 2)
    assert describe(empty) == {"accuracy": 0, "macro_f1": 0, "matthews": 0, "confusion": [[0, 0], [0, 0]]}
    many = np.eye(2, dtype=np.int64) * 2**40  # squares above 64 bits
    assert matthews(many) == pytest.approx(1)


def test_a_large_matrix_is_not_in_the_log() -> None:
    assert "confusion" in describe(np.eye(MAX_KEPT, dtype=np.int64))
    assert "confusion" not in describe(np.eye(MAX_KEPT + 1, dtype=np.int64))


def test_the_tables_say_what_the_matrix_says() -> None:
    matrix = [[90, 10], [30, 1070]]
    text = shown(class_table(matrix, ("[neg]", "pos")))
    assert "accuracy 96.67%" in text and "[neg]" in text and "0.7500" in text and "1,100" in text
    text = shown(confusion_table(matrix, ("[neg]", "pos")))
    assert "1,070" in text and "[neg]" in text and " 30 " in text


def test_of_many_classes_the_commonest_confusions_are_shown() -> None:
    matrix = np.eye(20, dtype=np.int64) * 50
    matrix[3, 7], matrix[12, 0] = 9, 4
    text = shown(confusion_table(matrix, [f"class {i}" for i in range(20)]))
    lines = [line.split() for line in text.splitlines()]
    assert ["class", "3", "class", "7", "9"] in lines and ["class", "12", "class", "0", "4"] in lines
    assert len(lines) == 4 and "50" not in text


@pytest.mark.parametrize("labels", [["negative", "positive"], [f"$label_{i}$ of some length" for i in range(15)]])
def test_the_picture_is_drawn(labels: list[str]) -> None:
    count = len(labels)
    figure = confusion_figure(np.arange(count * count).reshape(count, count), labels)
    FigureCanvasAgg(figure).draw()
    (axes, _) = figure.axes
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == (["0", "1", "2", "3"] if count == 2 else [])
    assert axes.get_yticklabels()[0].get_text()[:3] == ("neg" if count == 2 else r"\$l")
