"""The contract every linear keeps, dense or packed, the dense one, and what all packed ones are.

Adapters call `forward` and `dense_weight` and never ask what is inside: methods + quantizers, never their product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.kernels import few_rows


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
        return linear(x_TD, self.weight, None if self.bias is None else self.bias.to(self.weight.dtype))

    def dense_weight(self) -> torch.Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(nn.Module, ABC):
    """A linear whose weight is no parameter but buffers in some other form, so that nothing can train it.

    ``stored_shapes`` and ``read`` are how the loader fills one that was built on "meta": from a file that holds the
    packed buffers, or from the dense weight, which is packed as it comes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @abstractmethod
    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> x W^T + b (..., out)."""

    @abstractmethod
    def dense_weight(self) -> torch.Tensor:
        """W (out, in) in the compute dtype, made anew on each call."""

    @abstractmethod
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the file this will be read from: end of the tensor's name -> shape; the bias is left out."""

    @abstractmethod
    def read(self, name: str, source: Any, device: torch.device) -> None:
        """Fill this linear, called ``name``, from a `weights.source.TensorSource`; the bias is left out."""

    @property
    def num_weights(self) -> int:
        """How many weights it stands for, the bias left out."""
        return self.in_features * self.out_features


def linear(x_TD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, by the op that is the fastest for so many rows."""
    if bias is None and (ys := few_rows.multiply(x_TD, (weight,))) is not None:
        return ys[0]
    return F.linear(x_TD, weight, bias)


def dense_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter and of every packed linear's weight, dense, one at a time."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield f"{name}.weight", module.dense_weight()


def project(x_TD: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Apply linears that share an input, e.g. ``project(x, (q, k, v))``.

    A linear class that can do better for a group (an adapter that shares one low-rank product, a fused kernel) has a
    static method ``project_together(x, linears) -> outputs``; the first linear that has one does the whole group.
    """
    for linear in linears:
        together = getattr(linear, "project_together", None)
        if together is not None:
            return together(x_TD, linears)
    if all(type(linear) is Linear and linear.bias is None for linear in linears):
        ys = few_rows.multiply(x_TD, [linear.weight for linear in linears])  # pyright: ignore[reportArgumentType]
        if ys is not None:
            return ys
    return tuple(linear(x_TD) for linear in linears)
