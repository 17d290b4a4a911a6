"""The gradient of a weight that was rounded before it was used: that of the weight itself.

The straight-through estimator: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".

    forward   Y as it is, made of X and Q(W)        backward  dW = dY^T X

What X gets belongs to whoever made Y: dX = dY Q(W). Kept for backward: X.
"""

from __future__ import annotations

from typing import Any

import torch


class _WeightLearn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TO: torch.Tensor, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(x_TI)
        ctx.dtype = weight_OI.dtype
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x_TI,) = ctx.saved_tensors
        return dy_TO, None, (dy_TO.t() @ x_TI).to(ctx.dtype) if ctx.needs_input_grad[2] else None


def weight_learn(y_TO: torch.Tensor, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """As `reference.weight_learn`; y in the same memory."""
    return _WeightLearn.apply(y_TO, x_TI.detach(), weight_OI)  # pyright: ignore[reportReturnType]
