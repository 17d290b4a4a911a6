"""Rotary embedding with nothing kept for backward: the gradient is the rotation the other way round.

y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2;   dx1 = dy1 cos1 + dy2 sin2,  dx2 = dy2 cos2 - dy1 sin1
"""

from __future__ import annotations

from typing import Any

import torch

from alpaca_lora.kernels import few_rows


def _turn(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, *, back: bool) -> torch.Tensor:
    half = x_THE.shape[-1] // 2
    cos_T1E, sin_T1E = cos_TE.unsqueeze(1), sin_TE.unsqueeze(1)
    out_THE = x_THE * cos_T1E
    first, second = x_THE[..., :half], x_THE[..., half:]
    if back:
        out_THE[..., :half].addcmul_(second, sin_T1E[..., half:])
        out_THE[..., half:].addcmul_(first, sin_T1E[..., :half], value=-1)
    else:
        out_THE[..., :half].addcmul_(second, sin_T1E[..., :half], value=-1)
        out_THE[..., half:].addcmul_(first, sin_T1E[..., half:])
    return out_THE


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        return _turn(x_THE, cos_TE, sin_TE, back=False)

    @staticmethod
    def backward(ctx: Any, dy_THE: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_TE, sin_TE = ctx.saved_tensors
        return _turn(dy_THE, cos_TE, sin_TE, back=True), None, None


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """As `reference.rotate`; cos_TE and sin_TE carry no gradient."""
    if (y_THE := few_rows.rotate(x_THE, cos_TE, sin_TE)) is not None:
        return y_THE
    return _Rotate.apply(x_THE, cos_TE, sin_TE)  # pyright: ignore[reportReturnType]
