"""The contract every linear keeps, dense or quantized, and the dense one.

Adapters call `forward` and `dense_weight` and never ask what is inside: methods + quantizers, never their product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn


@runtime_checkable
class LinearContract(Protocol):
    """``forward(x) -> x W^T + b``; ``dense_weight() -> W (out, in)`` in the compute dtype, made anew if quantized."""

    in_features: int
    out_features: int

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def dense_weight(self) -> torch.Tensor: ...


class Linear(nn.Module):
    """A dense linear, frozen until somebody asks for its gradient: y = x W^T + b."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        # a trained bias is float32 beside a weight in bfloat16
        return F.linear(x_TD, self.weight, None if self.bias is None else self.bias.to(self.weight.dtype))

    def dense_weight(self) -> torch.Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def project(x_TD: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Apply linears that share an input, e.g. ``project(x, (q, k, v))``.

    A linear class that can do better for a group (an adapter that shares one low-rank product, a fused kernel) has a
    static method ``project_together(x, linears) -> outputs``; the first linear that has one does the whole group.
    """
    for linear in linears:
        together = getattr(linear, "project_together", None)
        if together is not None:
            return together(x_TD, linears)
    return tuple(linear(x_TD) for linear in linears)
