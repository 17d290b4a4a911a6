"""Adapters on a few rows in C, each row its own, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.kernels import few_rows, low_rank_rows
from alpaca_lora.kernels.low_rank_rows import MAX_RANK, LowRankRows, add_low_rank
from tests.kernels.compare import randn

pytestmark = pytest.mark.usefixtures("kernels")
USED_BY = (few_rows, low_rank_rows)  # what the fixture `kernels` gives its library to
DTYPES = [torch.float32, torch.bfloat16]
Part = tuple[int, torch.Tensor, float]


def update_of(width: int, parts: list[tuple[int, int, int, float]], dtype: torch.dtype, seed: int) -> tuple:
    """(what C reads, A, the parts) for parts of (place, rank, out, scale)."""
    made = [
        (place, randn(rank, out, dtype=dtype, seed=seed + place) / 4, scale) for place, rank, out, scale in parts
    ]  # fmt: skip
    A_RD = randn(sum(rank for _, rank, _, _ in parts), width, dtype=dtype, seed=seed) / width**0.5
    return LowRankRows(A_RD, made), A_RD, made


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_each_row_gets_its_own(dtype: torch.dtype) -> None:
    width, outs = 70, (200, 16, 9)
    made = [
        update_of(width, [(0, 16, 200, 2.0), (1, 4, 16, 0.5), (2, 7, 9, 1.0)], dtype, 1),
        update_of(width, [(2, 1, 9, 3.0)], dtype, 2),
        update_of(width, [(0, 33, 200, 1.0), (1, 8, 16, 1.0)], dtype, 3),
    ]
    which = [0, None, 1, 2, 2, 0, None]
    x_TD = randn(len(which), width, dtype=dtype)
    before = [randn(len(which), out, dtype=dtype, seed=out) for out in outs]
    outputs = [y.clone() for y in before]
    add_low_rank([None if w is None else made[w][0] for w in which], x_TD, outputs)
    for place, (y, old) in enumerate(zip(outputs, before, strict=True)):
        expected = old.double()
        for row, w in enumerate(which):
            if w is None:
                assert torch.equal(y[row], old[row])
                continue
            _, A_RD, parts = made[w]
            start = 0
            for at, B_RO, scale in parts:
                if at == place:
                    u = A_RD[start : start + len(B_RO)].double() @ x_TD[row].double()
                    expected[row] += scale * (u @ B_RO.double())
                start += len(B_RO)
        eps = torch.finfo(dtype).eps
        # one rounding to the dtype of the sum, and float32's of products of order 1
        assert bool(((y.double() - expected).abs() <= eps / 2 * 1.01 * expected.abs() + 2e-5).all())


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_nor_on_threads(dtype: torch.dtype) -> None:
    updates = [update_of(64, [(0, 16, 128, 1.5)], dtype, seed)[0] for seed in range(8)]
    x_TD, y_TO = randn(8, 64, dtype=dtype), randn(8, 128, dtype=dtype)
    together, threads = y_TO.clone(), torch.get_num_threads()
    add_low_rank(updates, x_TD, [together])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = y_TO.clone()
            add_low_rank(updates, x_TD, [again])
            assert torch.equal(again, together)
    finally:
        torch.set_num_threads(threads)
    for row in range(8):
        alone = y_TO[row : row + 1].clone()
        add_low_rank(updates[row : row + 1], x_TD[row : row + 1], [alone])
        assert torch.equal(alone[0], together[row])


def test_what_does_not_fit_is_refused() -> None:
    x_TD, y_TO = randn(2, 8), randn(2, 6)
    good = LowRankRows(randn(3, 8), [(0, randn(3, 6), 1.0)])
    for A_RD, parts in (
        (randn(3, 8), [(0, randn(2, 6), 1.0)]),  # ranks that do not add up
        (randn(3, 8).bfloat16(), [(0, randn(3, 6), 1.0)]),
        (randn(3, 8), [(0, randn(6, 3).t(), 1.0)]),  # not contiguous
        (randn(3, 8).half(), [(0, randn(3, 6).half(), 1.0)]),
        (randn(MAX_RANK + 1, 2), [(0, randn(MAX_RANK + 1, 2), 1.0)]),
    ):
        with pytest.raises(ValueError, match=r"contiguous|rank"):
            LowRankRows(A_RD, parts)
    for updates, x, outputs in (
        ([good], x_TD, [y_TO]),  # a row without a word
        ([good, None], x_TD[:, :7], [y_TO]),
        ([good, None], x_TD.bfloat16(), [y_TO.bfloat16()]),
        ([good, None], x_TD, [y_TO[:, :5].contiguous()]),
        ([good, None], x_TD, [randn(2, 12)[:, ::2]]),
        ([good] * 33, randn(33, 8), [randn(33, 6)]),
        ([LowRankRows(randn(3, 8), [(1, randn(3, 6), 1.0)]), None], x_TD, [y_TO]),  # a place that is not there
    ):
        with pytest.raises(ValueError, match=r"rows|fit|output"):
            add_low_rank(updates, x, outputs)
