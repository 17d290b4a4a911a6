"""Ops on a few rows without gradients, as decoding has them, in C: cpu/few_rows.c states the formulas.

A call of torch's costs more there than the work in it, and its products of one row with a matrix in bfloat16 do not
reach the memory's speed. Each function gives None where C cannot do it, or where many rows are better off elsewhere;
the caller then goes on in torch. A row's result does not depend on the other rows of the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from alpaca_lora.kernels.cpu.library import Library, library
from alpaca_lora.kernels.reference import Activation

DTYPES = (torch.float32, torch.bfloat16)
FEW_ROWS = 32


class _Matrix(ctypes.Structure):
    """`Matrix` of cpu/few_rows.c."""

    _fields_ = (("weight", ctypes.c_void_p), ("out", ctypes.c_void_p), ("out_features", ctypes.c_int64))


def _library(x: torch.Tensor, num_rows: int, *others: torch.Tensor) -> Library | None:
    """The ops in C, where they can take this: a few rows of contiguous tensors of one dtype, and no gradient."""
    if not 0 < num_rows <= FEW_ROWS or torch.is_grad_enabled() or x.dtype not in DTYPES or x.device.type != "cpu":
        return None
    if not all(one.dtype == x.dtype and one.is_contiguous() for one in (x, *others)):
        return None
    found = library()
    return None if found.handle is None else found


def multiply(x_TI: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    """x W^T (T, O) for each weight (O, I); they are read once, one after the other."""
    if x_TI.dim() != 2 or (found := _library(x_TI, x_TI.shape[0], *weights)) is None:
        return None
    num_tokens, in_features = x_TI.shape
    if any(weight.shape[1:] != (in_features,) for weight in weights):
        return None
    outputs = tuple(x_TI.new_empty(num_tokens, weight.shape[0]) for weight in weights)
    matrices = (_Matrix * len(weights))(
        *((weight.data_ptr(), y.data_ptr(), weight.shape[0]) for weight, y in zip(weights, outputs, strict=True))
    )
    failed = found.call(
        "multiply_dense", matrices, len(weights), x_TI, num_tokens, in_features, x_TI.dtype == torch.bfloat16,
        work=sum(weight.numel() for weight in weights),
    )  # fmt: skip
    return None if failed else outputs


def norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float) -> torch.Tensor | None:
    """As `reference.rms_norm`."""
    width = x_TD.shape[-1]
    num_rows = x_TD.numel() // width if width else 0
    # norms of heads have many short rows
    found = _library(x_TD, min(num_rows, FEW_ROWS) if x_TD.shape[0] <= FEW_ROWS else 0, weight_D)
    if found is None or weight_D.shape != (width,):
        return None
    y_TD = torch.empty_like(x_TD)
    found.call(
        "norm_rows", x_TD, weight_D, y_TD, num_rows, width, ctypes.c_float(eps), ctypes.c_float(offset),
        x_TD.dtype == torch.bfloat16, work=0,
    )  # fmt: skip
    return y_TD


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor | None:
    """As `reference.rotate`."""
    num_tokens, num_heads, width = x_THE.shape
    found = _library(x_THE, num_tokens, cos_TE, sin_TE)
    if found is None or not cos_TE.shape == sin_TE.shape == (num_tokens, width) or width % 2:
        return None
    y_THE = torch.empty_like(x_THE)
    found.call(
        "rotate_rows", x_THE, cos_TE, sin_TE, y_THE, num_tokens, num_heads, width, x_THE.dtype == torch.bfloat16, work=0
    )
    return y_THE


def gate(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation) -> torch.Tensor | None:
    """As `reference.gated`."""
    found = _library(gate_TF, gate_TF.shape[0], up_TF)
    if found is None or gate_TF.shape != up_TF.shape:
        return None
    y_TF = torch.empty_like(gate_TF)
    found.call(
        "gate_rows", gate_TF, up_TF, y_TF, gate_TF.numel(), activation != "silu", gate_TF.dtype == torch.bfloat16,
        work=0,
    )  # fmt: skip
    return y_TF
