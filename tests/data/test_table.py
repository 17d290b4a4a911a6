"""Tables over encoded rows."""

from __future__ import annotations

import numpy as np
import pytest

from alpaca_lora.data.example import TokenizedExample
from alpaca_lora.data.table import ExampleTable


def example(*ids: int) -> TokenizedExample:
    ids_T = np.array(ids, dtype=np.int32)
    return TokenizedExample(ids_T, ids_T % 2 == 0, 0)


def test_examples_come_back_with_their_positions() -> None:
    table = ExampleTable.from_examples([example(1, 2), example(3), example(4, 5, 6)])
    assert len(table) == 3 and table.num_tokens == 6 and table.num_supervised_tokens == 2
    assert table.lengths.tolist() == [2, 1, 3] and table.num_supervised.tolist() == [1, 0, 1]
    assert [one.ids_T.tolist() for one in table] == [[1, 2], [3], [4, 5, 6]]
    assert [one.index for one in table] == [0, 1, 2] and table[-1].index == 2
    assert table[2].supervised_T.tolist() == [True, False, True] and table[2].num_supervised == 1
    with pytest.raises(IndexError):
        table[3]


def test_a_choice_of_rows_counts_anew() -> None:
    rows = ExampleTable.from_examples([example(1, 2), example(3), example(4, 5, 6)])._rows
    table = ExampleTable(rows, np.array([2, 0]))
    assert [one.ids_T.tolist() for one in table] == [[4, 5, 6], [1, 2]]
    assert [one.index for one in table] == [0, 1] and table.lengths.tolist() == [3, 2]


def test_classes_come_from_the_labels_of_the_rows() -> None:
    ids_T = np.array([1, 2], dtype=np.int32)
    rows = [TokenizedExample(ids_T, ids_T > 1, 0, label) for label in (2, 0, 2)]
    table = ExampleTable.from_examples(rows)
    assert [one.label for one in table] == [2, 0, 2] and table.num_supervised.tolist() == [1, 1, 1]
    other = ExampleTable(table._rows, np.array([2, 1]), np.array([5, -1, 6]))
    assert other.classes_N is not None and other.classes_N.tolist() == [6, 5] and other[-1].label == 5
    assert ExampleTable.from_examples([example(1, 2)])[0].label is None
