"""From words to class numbers."""

from __future__ import annotations

import pytest

from alpaca_lora.data import classes
from alpaca_lora.data.classes import LabelNumbers, class_names, class_of_label, some
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import labelled


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["pos", "neg"], ("neg", "pos")),
        (["10", "9", "-1"], ("-1", "9", "10")),  # by value, not by the alphabet
        (["2.5", "10", "1e1"], ("2.5", "10", "1e1")),
        (["10", "9", "ten"], ("10", "9", "ten")),  # one that is no number: by the alphabet
        (["nan", "1"], ("1", "nan")),
    ],
)
def test_classes_are_in_an_order_that_rows_do_not_change(words: list[str], names: tuple[str, ...]) -> None:
    assert class_names(words) == names == class_names(words[::-1])


def test_words_become_numbers_and_numbers_classes() -> None:
    numbers = LabelNumbers()
    assert [numbers.number(labelled("t", word)) for word in ("b", "a", "b", "c")] == [0, 1, 0, 2]
    assert numbers.words == ["b", "a", "c"]
    assert class_of_label(numbers.words, ("a", "b")).tolist() == [1, 0, -1]


def test_a_column_of_no_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "MAX_LABELS", 2)
    numbers = LabelNumbers()
    for word in ("a", "b", "a"):
        numbers.number(labelled("t", word))
    with pytest.raises(DataError, match=r"f.tsv:3: label_key: there are more than 2 different labels"):
        numbers.number(labelled("t", "c", file="f.tsv", line=3))


def test_only_so_many_labels_are_named() -> None:
    assert some(["a", "b"]) == "'a', 'b'"
    assert some([str(i) for i in range(11)]).endswith("'9', ...")
