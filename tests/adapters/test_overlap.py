"""Norms, cosines and distances from factors against the same from dense updates."""

from __future__ import annotations

import math

import pytest
import torch

from alpaca_lora.adapters.combine import Combination, Update, combine
from alpaca_lora.adapters.overlap import overlap


def update(seed: int, rank: int = 3, scale: float = 0.5) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator), scale)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def test_figures_are_those_of_the_dense_updates() -> None:
    inputs = [{"m": update(0), "n": update(1)}, {"m": update(2, 4, 2.0), "n": update(3, 4)}]
    weights = [0.7, -0.4]
    result = combine(inputs, weights, Combination("svd", svd_rank=2))
    found = overlap(inputs, weights, result)
    dense = [torch.stack([one["m"].delta(), one["n"].delta()]) for one in [*inputs, result]]
    norms = [float(one.norm()) for one in dense]
    exact = 0.7 * dense[0] - 0.4 * dense[1]
    assert found.norms == pytest.approx(norms[:2]) and found.norm == pytest.approx(norms[2])
    masses = [0.7 * norms[0], 0.4 * norms[1]]
    assert found.shares == pytest.approx([mass / sum(masses) for mass in masses])
    assert found.distance == pytest.approx(float((dense[2] - exact).norm() / exact.norm()), rel=1e-4)
    assert found.distance > 0.1
    assert found.kept == pytest.approx([cosine(dense[0], dense[2]), cosine(-dense[1], dense[2])], abs=1e-6)
    mean = (cosine(dense[0][0], dense[1][0]) + cosine(dense[0][1], dense[1][1])) / 2
    assert found.cosines[0][1] == pytest.approx(mean, abs=1e-6)
    assert found.cosines[0][0] == pytest.approx(1)


def test_an_exact_sum_is_no_distance_away() -> None:
    inputs = [{"m": update(0)}, {"m": update(1)}]
    assert overlap(inputs, [0.3, 0.6], combine(inputs, [0.3, 0.6], Combination("cat"))).distance < 1e-6


def test_opposite_updates_are_seen_and_cancel() -> None:
    one = update(0)
    inputs = [{"m": one}, {"m": one._replace(scale=-one.scale)}]
    found = overlap(inputs, [1.0, 1.0], combine(inputs, [1.0, 1.0], Combination("cat")))
    assert found.cosines[0][1] == pytest.approx(-1)
    assert found.norm < 1e-6 * found.norms[0]


def test_what_shares_no_module_has_no_cosine() -> None:
    inputs = [{"m": update(0)}, {"n": update(1)}]
    found = overlap(inputs, [1.0, 1.0], combine(inputs, [1.0, 1.0], Combination("cat")))
    assert math.isnan(found.cosines[0][1]) and math.isnan(found.cosines[1][0])
    assert found.distance < 1e-6
