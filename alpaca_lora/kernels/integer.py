"""Products of 8-bit integers, weights and activations both, as one autograd node.

    X8 = round(X / a)   Y = (X8 C^T) a s,  the product in whole numbers (int32), scaled in float32
    dX = (dY s) C       straight-through: rounding and clipping of X have derivative 1 (Bengio et al. 2013)

a: one scale for each token, or one for all; s: one for each output; C: int8 (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from alpaca_lora.kernels.tiled import constant_columns, spans

LARGEST = 127
EXACT_INPUTS = 1024  # products of 8 bits that float32 adds up exactly: 1024 * 127^2 < 2^24
# A product is made in pieces of so many tokens and sums, so that rounding and scaling find their numbers in the cache:
# 2048 tokens through 4096 x 4096 on one core take 92 ms, 133 in one piece, and 150 as bfloat16.
TOKENS = 512
SUMS = 2**18
ALIGNMENT = 64
# 512 x 4096 in bfloat16 are rounded to 8 bits in 1 ms so, in one piece in 8: large temporaries are new pages
ROUNDED_ELEMENTS = 2**17


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], codes_OI.shape[0])
        for start in range(0, x_TI.shape[0], TOKENS):
            tokens = slice(start, start + TOKENS)
            some_TI = x_TI[tokens]
            x8_TI, scale_T1 = quantize_tokens(some_TI) if scale is None else quantize_with(some_TI, scale)
            step = max(ALIGNMENT, SUMS // some_TI.shape[0] // ALIGNMENT * ALIGNMENT)
            for first in range(0, codes_OI.shape[0], step):
                rows = slice(first, first + step)
                sums_TO = integer_product(x8_TI, codes_OI[rows])
                torch.mul(sums_TO * scales_O[rows], scale_T1, out=y_TO[tokens, rows])
        ctx.save_for_backward(codes_OI, scales_O)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        codes_OI, scales_O = ctx.saved_tensors
        scaled_TO = constant_columns(dy_TO, scales_O)
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], codes_OI.shape[1])
        for columns in spans(codes_OI.shape[1], codes_OI.shape[0]):
            dx_TI[:, columns] = scaled_TO @ codes_OI[:, columns].to(dy_TO.dtype)
        return dx_TI, None, None, None


def integer_linear(
    x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """As `reference.integer_linear`, (T, out) in x's dtype. scale: of all activations (1,); None: each token's own."""
    return _IntegerLinear.apply(x_TI, codes_OI, scales_O, scale)  # pyright: ignore[reportReturnType]


def quantize_tokens(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (T, in), float32 scales (T, 1)), each token by its largest magnitude; NaN or infinite where that is."""
    codes_TI = torch.empty(x_TI.shape, dtype=torch.int8, device=x_TI.device)
    scale_T1 = torch.empty(x_TI.shape[0], 1, dtype=torch.float32, device=x_TI.device)
    for tokens in _pieces(x_TI):
        some_TI = x_TI[tokens].float()
        largest_T1 = some_TI.abs().amax(1, keepdim=True)
        some_T1 = torch.div(largest_T1, LARGEST, out=scale_T1[tokens]).clamp_min_(torch.finfo(torch.float32).tiny)
        codes_TI[tokens] = torch.mul(some_TI, some_T1.reciprocal()).round_()
    return codes_TI, scale_T1


def quantize_with(x_TI: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (T, in), ``scale``) by a float32 scale (1,) that is known beforehand: what lies beyond it is clipped.

    Whole numbers cannot say NaN. Where there is one, scales are (T, 1), and NaN for its token.
    """
    codes_TI = torch.empty(x_TI.shape, dtype=torch.int8, device=x_TI.device)
    factor = scale.reciprocal()
    for tokens in _pieces(x_TI):
        codes_TI[tokens] = torch.mul(x_TI[tokens], factor).round_().clamp_(-LARGEST, LARGEST)
    # a sum is cheap, but infinities may make it NaN as well
    if bool(x_TI.sum().isnan()):
        scale = torch.where(x_TI.isnan().any(1, keepdim=True), torch.nan, scale)
    return codes_TI, scale


def _pieces(x_TI: torch.Tensor) -> Iterator[slice]:
    """Slices of tokens, few enough to be rounded within the cache."""
    step = max(1, ROUNDED_ELEMENTS // x_TI.shape[1])
    return (slice(start, start + step) for start in range(0, x_TI.shape[0], step))


def integer_product(x8_TI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """X C^T of int8 matrices, int32 (T, out), exactly."""
    # with one input, C^T looks like a matrix in rows as well as in columns, and torch takes it for the wrong one
    if x8_TI.device.type == "cpu" and x8_TI.shape[1] > 1 and _is_exact():
        return torch._int_mm(x8_TI, codes_OI.t())  # pyright: ignore[reportPrivateImportUsage]
    return plain_product(x8_TI, codes_OI)


def plain_product(x8_TI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """As `integer_product`, where torch has no such product or asks for certain sizes: sums of so few products that
    float32 holds them exactly.
    """
    total_TO = torch.zeros(x8_TI.shape[0], codes_OI.shape[0], dtype=torch.int32, device=x8_TI.device)
    for start in range(0, x8_TI.shape[1], EXACT_INPUTS):
        part = slice(start, start + EXACT_INPUTS)
        total_TO += (x8_TI[:, part].float() @ codes_OI[:, part].float().t()).to(torch.int32)
    return total_TO


@cache
def _is_exact() -> bool:
    """Whether torch's integer product holds the largest sums: processors without VNNI add pairs in 16 bits."""
    most = torch.full((16, 64), LARGEST, dtype=torch.int8)
    sums = torch._int_mm(torch.cat((most, -most)), most.t())  # pyright: ignore[reportPrivateImportUsage]
    return sums.unique().tolist() == [-64 * LARGEST**2, 64 * LARGEST**2]
