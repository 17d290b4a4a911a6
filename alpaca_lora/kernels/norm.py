"""RMSNorm as one autograd node: keeps x and one float per row, never a float32 copy of the activations.

With n = x rstd, w' = offset + w:   y = n w'   dx = rstd (dy w' - n mean(dy w' n))   dw = sum_T dy n
"""

from __future__ import annotations

from typing import Any

import torch


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        wide_TD = x_TD.float()
        rstd_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True).square_()
        rstd_T1 = rstd_T1.div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        ctx.offset = offset
        return _scaled(wide_TD, weight_D, rstd_T1, offset, x_TD.dtype)

    @staticmethod
    def remake(ctx: Any) -> torch.Tensor:
        """The output once more, bit for bit, from what is kept (models/recompute.py)."""
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        return _scaled(x_TD, weight_D, rstd_T1, ctx.offset, x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        normal_TD = x_TD * rstd_T1  # float32 by promotion, and never x itself
        dw_D = None
        if ctx.needs_input_grad[1]:
            dw_D = (dy_TD.float() * normal_TD).sum(0).to(weight_D.dtype)
        dx_TD = None
        if ctx.needs_input_grad[0]:
            scaled_TD = dy_TD * (weight_D.float() + ctx.offset)
            mean_T1 = torch.linalg.vecdot(scaled_TD, normal_TD).div_(x_TD.shape[-1]).unsqueeze_(-1)
            dx_TD = scaled_TD.sub_(normal_TD.mul_(mean_T1)).mul_(rstd_T1).to(x_TD.dtype)
        return dx_TD, dw_D, None, None


def _scaled(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rstd_T1: torch.Tensor, offset: float, dtype: torch.dtype
) -> torch.Tensor:
    normal_TD = x_TD * rstd_T1  # float32 by promotion
    if offset:
        return normal_TD.mul_(weight_D.float() + offset).to(dtype)
    # the definition rounds to x's dtype before the weight; so do we
    return normal_TD.to(dtype).mul_(weight_D)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """As `reference.rms_norm`; the last axis is normalised, the leading ones are free."""
    return _RmsNorm.apply(x_TD, weight_D, eps, offset)  # pyright: ignore[reportReturnType]
