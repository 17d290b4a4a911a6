"""Which rows a step sees and how they share micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.data.example import TokenizedExample
from alpaca_lora.data.examples import StepBatch
from alpaca_lora.data.loader import Loader
from alpaca_lora.data.table import ExampleTable


def table_of(lengths: list[int]) -> ExampleTable:
    return ExampleTable.from_examples(
        [TokenizedExample(np.full(n, i, np.int32), np.ones(n, bool), 0) for i, n in enumerate(lengths)]
    )


def loader_of(
    num_rows: int, *, batch_size: int, seed: int = 0, group_by_length: bool = False, budget: int = 100
) -> Loader:
    lengths = np.random.default_rng(1).integers(1, 60, num_rows).tolist()
    return Loader(
        table_of(lengths), batch_size=batch_size, token_budget=budget, seed=seed, group_by_length=group_by_length
    )


def rows_of(step: StepBatch) -> list[int]:
    return sorted(index for batch in step.micro_batches for index in batch.indices)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31), st.booleans())
def test_an_epoch_is_a_permutation(num_rows: int, batch_size: int, seed: int, grouped: bool) -> None:
    loader = loader_of(num_rows, batch_size=batch_size, seed=seed, group_by_length=grouped)
    for epoch in range(2):
        steps = [loader.step_batch(epoch * loader.steps_per_epoch + i) for i in range(loader.steps_per_epoch)]
        assert all(step.epoch == epoch for step in steps)
        assert sorted(index for step in steps for index in rows_of(step)) == list(range(num_rows))
        assert [step.num_examples for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
        assert steps[-1].num_examples == (num_rows - 1) % batch_size + 1  # what is left is a smaller step, not mixed in


def test_a_step_is_a_function_of_seed_and_step() -> None:
    first, again = loader_of(50, batch_size=8), loader_of(50, batch_size=8)
    forward = [rows_of(first.step_batch(step)) for step in range(20)]
    backward = [rows_of(again.step_batch(step)) for step in reversed(range(20))][::-1]  # a resumed run seeks
    assert forward == backward
    assert forward != [rows_of(loader_of(50, batch_size=8, seed=1).step_batch(step)) for step in range(20)]
    assert forward[:7] != forward[7:14]  # another epoch, another order


def test_grouping_never_changes_which_rows_a_step_sees() -> None:
    plain, grouped = loader_of(200, batch_size=32), loader_of(200, batch_size=32, group_by_length=True)
    for step in range(14):
        assert rows_of(plain.step_batch(step)) == rows_of(grouped.step_batch(step))


def test_grouping_puts_rows_of_like_length_together() -> None:
    def spread(grouped: bool) -> float:
        step = loader_of(200, batch_size=200, group_by_length=grouped, budget=300).step_batch(0)
        return float(np.mean([max(batch.lengths) - min(batch.lengths) for batch in step.micro_batches]))

    assert spread(True) < 0.3 * spread(False)


def test_the_order_has_no_memory_of_lengths() -> None:
    loader = loader_of(4000, batch_size=64)
    rows = np.concatenate([loader.step_rows(step) for step in range(loader.steps_per_epoch)])
    lengths = loader.table.lengths[rows].astype(float)
    correlation = np.corrcoef(lengths[:-1], lengths[1:])[0, 1]
    assert abs(correlation) < 0.2
    sorted_lengths = np.sort(lengths)  # the measure sees an order by length
    assert np.corrcoef(sorted_lengths[:-1], sorted_lengths[1:])[0, 1] > 0.9


@pytest.mark.parametrize("grouped", [False, True])
def test_a_micro_batch_keeps_its_budget(grouped: bool) -> None:
    loader = Loader(
        table_of([10] * 20 + [500]), batch_size=21, token_budget=64, seed=0, group_by_length=grouped
    )  # one row alone is over the budget
    sizes = Counter(batch.num_tokens for batch in loader.step_batch(0).micro_batches)
    assert sizes[500] == 1 and all(size <= 64 for size in sizes if size != 500)
    assert sum(size * count for size, count in sizes.items()) == 700


def test_evaluation_sees_every_row_once_and_always_in_one_order() -> None:
    loader = loader_of(77, batch_size=8)
    first = [batch.indices for batch in loader.eval_batches()]
    assert first == [batch.indices for batch in loader_of(77, batch_size=3, seed=5).eval_batches()]
    assert sorted(index for indices in first for index in indices) == list(range(77))


def test_an_empty_table_or_batch_is_our_defect() -> None:
    with pytest.raises(ValueError, match="batch of 0"):
        loader_of(3, batch_size=0)
    empty = ExampleTable(table_of([1])._rows, np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="without examples"):
        Loader(empty, batch_size=1, token_budget=1, seed=0)
