"""Several tensors of one shape -> one: thin out each, elect a sign for each entry, add what agrees.

Knows tensors only; which tensors of an adapter these are, `adapters/combine.py` decides. Everything is a pure function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Election = Literal["total", "frequency"]


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The floor(density * n) entries of largest magnitude, zero elsewhere (TIES, Yadav et al. 2023, section 4.1)."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(tensor.shape)


def drop_at_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each entry kept with probability `density` and then divided by it: the expectation stays (DARE, Yu et al. 2024,
    equation 3 with p = 1 - density)."""
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * kept / density


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_n w_n t_n (task arithmetic, Ilharco et al. 2023)."""
    return _weighted(torch.stack(list(tensors)), weights).sum(dim=0)


def elected_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], election: Election) -> torch.Tensor:
    """Mean of w_n t_n over those n whose t_n has the elected sign; zero where none has (TIES, sections 4.2 and 4.3).

    `election`: the sign of the sum of the t_n ("total"), or the sign that most of them have ("frequency"); a draw
    elects plus. The weights do not vote, which is PEFT's reading: they scale what was elected.
    """
    stack_N = torch.stack(list(tensors))
    signs_N = stack_N.sign()
    votes = (stack_N if election == "total" else signs_N).sum(dim=0)
    agrees_N = signs_N == torch.where(votes >= 0, 1, -1)
    return (_weighted(stack_N, weights) * agrees_N).sum(dim=0) / agrees_N.sum(dim=0).clamp(min=1)


def _weighted(stack_N: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    return stack_N * torch.tensor(weights, dtype=stack_N.dtype).reshape(-1, *(1,) * (stack_N.ndim - 1))
