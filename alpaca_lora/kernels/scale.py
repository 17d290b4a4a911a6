"""A learned factor for each column, as one autograd node: DoRA's magnitude, IA3's vectors.

With g = m inverse_norm, b the bias:   y = g (z - b) + b
backward:   dz = g dy   dm = inverse_norm sum_T dy (z - b), summed in float32

That is a batch normalisation whose mean, variance and weight are given (b, 1, g), so its product of processor kernels
serves: one pass forward, one backward that makes dz and dm together (1024 x 1536 in bfloat16: 0.4 and 0.5 ms; torch's
product, conversion and sum for dm alone take 1.1 ms). Kept for backward: z in its own dtype, and vectors.

`scale_learn` has the backward pass for m alone, of outputs that m scaled already.
"""

from __future__ import annotations

from typing import Any

import torch


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_TO: torch.Tensor, m_O: torch.Tensor, inverse_norm_O: torch.Tensor | None,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        wide = torch.promote_types(z_TO.dtype, torch.float32)
        factor_O = m_O.to(wide) if inverse_norm_O is None else m_O.to(wide) * inverse_norm_O
        center_O = torch.zeros_like(factor_O) if bias_O is None else bias_O.to(wide)
        ctx.save_for_backward(z_TO, factor_O, center_O, inverse_norm_O)
        ctx.dtype_m = m_O.dtype
        y, _, _ = torch.ops.aten.native_batch_norm(
            _as_image(z_TO), factor_O, center_O, center_O, torch.ones_like(factor_O), False, 0.0, 0.0
        )
        return _as_rows(y)

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z_TO, factor_O, center_O, inverse_norm_O = ctx.saved_tensors
        wants_z, wants_m = ctx.needs_input_grad[:2]
        dz, dm_O, _ = torch.ops.aten.native_batch_norm_backward(
            _as_image(dy_TO), _as_image(z_TO), factor_O, center_O, torch.ones_like(factor_O), None, None, False, 0.0,
            [wants_z, wants_m, False],
        )  # fmt: skip
        if wants_m:
            dm_O = (dm_O if inverse_norm_O is None else dm_O * inverse_norm_O).to(ctx.dtype_m)
        return _as_rows(dz) if wants_z else None, dm_O if wants_m else None, None, None


class _ScaleLearn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TO: torch.Tensor, m_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        wide = torch.promote_types(y_TO.dtype, torch.float32)
        inverse_O = torch.where(m_O != 0, m_O.to(wide).reciprocal(), 0.0)
        center_O = torch.zeros_like(inverse_O) if bias_O is None else bias_O.to(wide)
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(y_TO, inverse_O, center_O)
        ctx.dtype_m = m_O.dtype
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y_TO, inverse_O, center_O = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy_TO, None, None
        ones_O = torch.ones_like(inverse_O)
        _, dm_O, _ = torch.ops.aten.native_batch_norm_backward(
            _as_image(dy_TO), _as_image(y_TO), ones_O, center_O, ones_O, None, None, False, 0.0, [False, True, False]
        )
        return dy_TO, (dm_O * inverse_O).to(ctx.dtype_m), None


def _as_image(x_TO: torch.Tensor) -> torch.Tensor:
    """(1, O, T, 1) over the same memory: columns are channels that lie last, as the kernel reads fastest."""
    return x_TO.contiguous()[None, :, None, :].permute(0, 3, 1, 2)


def _as_rows(image: torch.Tensor) -> torch.Tensor:
    """(T, O), contiguous: the inverse of `_as_image`."""
    return image.permute(0, 2, 3, 1)[0, :, 0].contiguous()


def scale_columns(
    z_TO: torch.Tensor, m_O: torch.Tensor, inverse_norm_O: torch.Tensor | None, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """As `reference.scale_columns`."""
    return _ScaleColumns.apply(z_TO, m_O, inverse_norm_O, bias_O)  # pyright: ignore[reportReturnType]


def scale_learn(y_TO: torch.Tensor, m_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """As `reference.scale_learn`; y in the same memory."""
    return _ScaleLearn.apply(y_TO, m_O, bias_O)  # pyright: ignore[reportReturnType]
