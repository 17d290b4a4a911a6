"""How the updates of several adapters lie to each other and to what was made of them: norms, cosines, what was lost.

Knows factors only: the inner product of B A and D C (Frobenius) is the sum of (B^T D) * (A C^T), so no update is ever
made in full. In float64, since differences of large products are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alpaca_lora.adapters.combine import Update


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of N inputs and their result, Frobenius norms over all modules together.

    norms: of each input's update, unweighted. shares: |w| norm of each, over their sum. cosines: N x N, the mean over
    the modules that both change, nan where there is none: -1 opposite, 0 independent, 1 the same direction.
    kept: cosine of each input's weighted update with the result. norm: of the result. distance: norm of
    (result - weighted sum of the inputs), over the norm of that sum: 0 is exact.
    """

    norms: list[float]
    shares: list[float]
    cosines: list[list[float]]
    kept: list[float]
    norm: float
    distance: float


def overlap(inputs: Sequence[Mapping[str, Update]], weights: Sequence[float], result: Mapping[str, Update]) -> Overlap:
    """Measure N inputs against the `result` that was made of them with `weights`."""
    num = len(inputs)
    total_NN = torch.zeros(num + 1, num + 1, dtype=torch.float64)  # the last row is the result's
    cosines_NN, shared_NN = torch.zeros(num, num, dtype=torch.float64), torch.zeros(num, num, dtype=torch.float64)
    for name, made in result.items():
        gram_NN = _gram([*(updates.get(name) for updates in inputs), made])
        total_NN += gram_NN
        norms_N = gram_NN.diagonal().clamp(min=0).sqrt()[:num]
        product_NN = norms_N[:, None] * norms_N
        acts_NN = product_NN > 0
        cosines_NN += torch.where(acts_NN, gram_NN[:num, :num] / product_NN, 0)
        shared_NN += acts_NN
    weights_N = torch.tensor(list(weights), dtype=torch.float64)
    norms = total_NN.diagonal().clamp(min=0).sqrt().tolist()
    masses = [abs(weight) * norm for weight, norm in zip(weights, norms, strict=False)]
    to_result = total_NN[num, :num]
    exact = float(weights_N @ total_NN[:num, :num] @ weights_N)
    missed = float(total_NN[num, num] - 2 * weights_N @ to_result) + exact
    return Overlap(
        norms=norms[:num],
        shares=[mass / sum(masses) if sum(masses) else 0.0 for mass in masses],
        cosines=(cosines_NN / shared_NN).tolist(),
        kept=[
            _cosine(float(to_result[n]) * weight, norms[n] * abs(weight) * norms[num])
            for n, weight in enumerate(weights)
        ],
        norm=norms[num],
        # what rounding leaves of a sum that cancels is no sum
        distance=math.sqrt(max(missed, 0.0) / exact) if exact > 1e-12 * sum(masses) ** 2 else math.inf,
    )  # fmt: skip


def _cosine(product: float, norms: float) -> float:
    return product / norms if norms else 0.0


def _gram(updates: Sequence[Update | None]) -> torch.Tensor:
    """Inner products of all pairs (N, N) float64; zero for an input that has no such module."""
    gram_NN = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for row, one in enumerate(updates):
        for column, other in enumerate(updates[: row + 1]):
            if one is not None and other is not None:
                small = (one.lora_B.double().t() @ other.lora_B.double()) * (
                    one.lora_A.double() @ other.lora_A.double().t()
                )
                gram_NN[row, column] = gram_NN[column, row] = small.sum() * one.scale * other.scale
    return gram_NN
