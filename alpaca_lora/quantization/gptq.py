"""GPTQ: int4 codes column by column, each column's rounding error made up for by the columns still to come.

Frantar et al. 2022, algorithm 1. With H = 2 X^T X over the calibration rows (plus damping) and U the upper Cholesky
factor of H^-1, column q of W is rounded, its error e = (w_q - Q(w_q)) / U_qq, and every later column j loses e U_qj.
Columns are taken in blocks, whose effect on the rest is applied at once. Groups of columns get scale and zero point
when the first of them is reached, from the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.int4 import Int4

DAMPING = 0.01  # of the mean diagonal of H
BLOCK = 128  # columns
MORE_DAMPING = (1, 10, 100)  # times DAMPING, tried in this order


def hessian(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """2 X^T X / T float32 (in, in) of chunks (T, in); the factor does not change the result."""
    total, count = None, 0
    for chunk in inputs:
        chunk = chunk.float()
        product = chunk.t() @ chunk
        total = product if total is None else total.add_(product)
        count += chunk.shape[0]
    assert total is not None, "no calibration inputs"
    return total.mul_(2 / count)


def gptq(weight_OI: torch.Tensor, hessian_II: torch.Tensor, scheme: Int4, *, name: str) -> dict[str, torch.Tensor]:
    """Parts of ``scheme`` for a weight (out, in), given `hessian` of what the linear sees. NumericalError naming the
    linear when the weight or the inputs are not finite.
    """
    weight_OI = weight_OI.float().clone()
    if not (bool(torch.isfinite(weight_OI).all()) and bool(torch.isfinite(hessian_II).all())):
        raise NumericalError("weights or activations that are NaN or infinite", field=name)
    dead_I = hessian_II.diagonal() == 0  # inputs that were always zero: their weights do not matter
    weight_OI[:, dead_I] = 0
    upper_II = _upper_factor(hessian_II, dead_I, name)
    size, num_columns = scheme.group_size, weight_OI.shape[1]
    codes_OI = torch.empty_like(weight_OI)
    scales, zeros = [], []
    scale_O = zero_O = weight_OI.new_empty(0)
    for start in range(0, num_columns, BLOCK):
        end = min(start + BLOCK, num_columns)
        errors = torch.zeros_like(weight_OI[:, start:end])
        for column in range(start, end):
            if column % size == 0:
                # later columns of the group may lie beyond this block: what they have lost so far is not applied yet
                pending = weight_OI[:, end : column + size] - errors @ upper_II[start:end, end : column + size]
                group = torch.cat((weight_OI[:, column : min(column + size, end)], pending), dim=1)
                scale_O, zero_O = scheme.group_parameters(group)
                scales.append(scale_O)
                zeros.append(zero_O)
            w_O = weight_OI[:, column]
            codes_OI[:, column] = code_O = scheme.round_to_codes(w_O, scale_O, zero_O)
            error_O = (w_O - (code_O - zero_O) * scale_O) / upper_II[column, column]
            weight_OI[:, column + 1 : end] -= error_O[:, None] * upper_II[column, column + 1 : end]
            errors[:, column - start] = error_O
        weight_OI[:, end:] -= errors @ upper_II[start:end, end:]
    return scheme.pack(codes_OI, torch.stack(scales, 1), torch.stack(zeros, 1))


def _upper_factor(hessian_II: torch.Tensor, dead_I: torch.Tensor, name: str) -> torch.Tensor:
    """U with H^-1 = U^T U, of the damped H; more damping where that is not positive definite."""
    for factor in MORE_DAMPING:
        damped = hessian_II.double()
        damped.diagonal()[dead_I] = 1
        damped.diagonal().add_(DAMPING * factor * float(damped.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
    raise NumericalError(
        "the calibration rows say too little of its inputs", field=name, fix="raise calibration_tokens"
    )
