"""Pruning and election against PEFT's functions, and on numbers that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.adapters.pruning import Election, drop_at_random, elected_mean, keep_largest, weighted_sum


def stack(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.99])
def test_the_largest_are_kept_as_peft_keeps_them(density: float) -> None:
    from peft.utils.merge_utils import magnitude_based_pruning

    tensor = stack()[0]
    kept = keep_largest(tensor, density)
    assert torch.equal(kept, magnitude_based_pruning(tensor, density))
    assert int((kept != 0).sum()) == int(density * 35)


def test_dropping_keeps_the_expectation() -> None:
    tensor = torch.ones(200, 200)
    thinned = drop_at_random(tensor, 0.25, torch.Generator().manual_seed(1))
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert abs(float(thinned.mean()) - 1) < 0.04  # five standard deviations of the mean of 40,000 draws


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_election_is_pefts(election: Election) -> None:
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    tensors, weights = stack(2), [0.5, -1.0, 2.0]
    tensors[0][0], tensors[1][0] = 0.0, -tensors[2][0]  # draws and zeros
    mask = calculate_majority_sign_mask(torch.stack(tensors), method=election)
    theirs = disjoint_merge(torch.stack(tensors) * torch.tensor(weights)[:, None, None], mask)
    torch.testing.assert_close(elected_mean(tensors, weights, election), theirs)


def test_the_two_elections_differ() -> None:
    tensors = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    assert elected_mean(tensors, [1.0, 1.0, 1.0], "total").item() == 3.0
    assert elected_mean(tensors, [1.0, 1.0, 1.0], "frequency").item() == -1.0


def test_weights_scale_and_do_not_vote() -> None:
    tensors = [torch.tensor([3.0]), torch.tensor([-1.0])]
    assert elected_mean(tensors, [0.1, 100.0], "total").item() == pytest.approx(0.3)
    assert weighted_sum(tensors, [0.1, 100.0]).item() == pytest.approx(-99.7)
