"""Micro-batches from lengths."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.data.packing import pack_best_fit, pack_by_length

LENGTHS = st.lists(st.integers(1, 50), max_size=60)
PACKERS = pytest.mark.parametrize("pack", [pack_best_fit, pack_by_length])


@PACKERS
@given(lengths=LENGTHS, budget=st.integers(1, 60))
def test_every_row_is_in_one_bin_and_no_bin_is_over_its_budget(pack, lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(position for one in bins for position in one) == list(range(len(lengths)))
    for one in bins:
        assert one and (sum(lengths[position] for position in one) <= budget or len(one) == 1)


@given(lengths=LENGTHS, budget=st.integers(50, 80))
def test_best_fit_keeps_its_bound(lengths: list[int], budget: int) -> None:
    fewest = -(-sum(lengths) // budget)  # no packing needs fewer
    assert len(pack_best_fit(lengths, budget)) <= 11 / 9 * max(fewest, sum(n * 2 > budget for n in lengths)) * 1.5 + 1


def test_best_fit_fills_the_fullest_bin_that_takes_the_row() -> None:
    # 60, 50 open bins with 40 and 50 free; 35 goes to the fuller one, 45 to the other
    assert pack_best_fit([60, 50, 35, 45], 100) == [[0, 2], [1, 3]]


def test_by_length_puts_neighbours_together() -> None:
    assert pack_by_length([10, 90, 11, 89, 12], 180) == [[1, 3], [4, 2, 0]]


def test_many_rows_take_no_square_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, 60_000)
    started = time.process_time()
    bins = pack_best_fit(lengths, 2048)
    assert time.process_time() - started < 5
    assert lengths.sum() / (len(bins) * 2048) > 0.99


@PACKERS
def test_a_budget_below_one_is_our_defect(pack) -> None:
    with pytest.raises(ValueError, match="budget"):
        pack([1], 0)
