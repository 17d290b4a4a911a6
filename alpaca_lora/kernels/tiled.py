"""A linear whose weight is made tile by tile and never stands whole, as one autograd node.

    forward   Y[:, rows] = X W[rows]^T                 tiles of rows: each output is one product, rounded once
    backward  dX[:, columns] = dY W[:, columns]        tiles of columns: the same holds for each input's gradient

Nothing is kept for backward: W gets no gradient, and dX needs W alone, which is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from alpaca_lora.kernels.float8 import widen

# (rows, columns) of W (out, in) -> that part of W, in the dtype of X; used up before the next one is asked for
Tile = Callable[[slice, slice], torch.Tensor]
Few = Callable[[torch.Tensor], torch.Tensor | None]  # X -> X W^T without tiles, or None where tiles are better

# elements of a tile, 16 MB of bfloat16: 4096 x 4096 at 1,024 tokens takes 90 ms backward, 98 in tiles of a quarter
TILE_ELEMENTS = 2**23
SCALED_ELEMENTS = 2**17
# one token through 4096 x 4096 in 8 bits takes 1.1 ms so, 3.7 through tiles, 1.9 in bfloat16; 16 take 5.0 and 4.3
FEW_TOKENS = 8
ALIGNMENT = 256  # tiles of columns begin on a multiple of this, so that no quantization block is cut in two


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, tile: Tile, out_features: int, few: Few | None) -> torch.Tensor:
        ctx.tile, ctx.in_features = tile, x_TI.shape[1]
        if few is not None and (y_TO := few(x_TI)) is not None:
            return y_TO
        y_TO = x_TI.new_empty(x_TI.shape[0], out_features)
        for rows in spans(out_features, x_TI.shape[1]):
            torch.mm(x_TI, tile(rows, slice(0, x_TI.shape[1])).t(), out=y_TO[:, rows])
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        out_features = dy_TO.shape[1]
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], ctx.in_features)
        for columns in spans(ctx.in_features, out_features):
            torch.mm(dy_TO, ctx.tile(slice(0, out_features), columns), out=dx_TI[:, columns])
        return dx_TI, None, None, None


class _ScaledLinear(torch.autograd.Function):
    """Y = (X C^T) s,  dX = (dY s) C, with C in the dtype of X a tile at a time; s in float32."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], codes_OI.shape[0])
        if _reads_integers(x_TI, codes_OI):
            ones_O = x_TI.new_ones(codes_OI.shape[0])
            product_TO = torch.ops.aten._weight_int8pack_mm(x_TI.contiguous(), codes_OI, ones_O)
            _scale_columns(product_TO, scales_O, y_TO)
        else:
            for rows in spans(*codes_OI.shape):
                product_TO = x_TI @ widen(codes_OI[rows], x_TI.dtype).t()
                _scale_columns(product_TO, scales_O[rows], y_TO[:, rows])
        ctx.save_for_backward(codes_OI, scales_O)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        codes_OI, scales_O = ctx.saved_tensors
        scaled_TO = torch.empty_like(dy_TO)
        _scale_columns(dy_TO, scales_O, scaled_TO)
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], codes_OI.shape[1])
        for columns in spans(codes_OI.shape[1], codes_OI.shape[0]):
            dx_TI[:, columns] = scaled_TO @ widen(codes_OI[:, columns], dy_TO.dtype)
        return dx_TI, None, None


class _ScaledColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, scales_I: torch.Tensor) -> torch.Tensor:
        scaled_TI = torch.empty_like(x_TI)
        _scale_columns(x_TI, scales_I, scaled_TI)
        ctx.save_for_backward(scales_I)
        return scaled_TI

    @staticmethod
    def backward(ctx: Any, dy_TI: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _ScaledColumns.apply(dy_TI, *ctx.saved_tensors), None


def constant_columns(x_TI: torch.Tensor, scales_I: torch.Tensor) -> torch.Tensor:
    """x * scales in the dtype of x, with float32 scales (in,): as `reference.scale_columns`, but they are constants."""
    return _ScaledColumns.apply(x_TI, scales_I)  # pyright: ignore[reportReturnType]


def _scale_columns(product_TO: torch.Tensor, scales_O: torch.Tensor, out_TO: torch.Tensor) -> None:
    """product * scales into ``out``, in float32 inside, in pieces: in one, torch makes whole matrices in float32."""
    num_tokens = max(1, SCALED_ELEMENTS // product_TO.shape[1])
    for some, place in zip(product_TO.split(num_tokens), out_TO.split(num_tokens), strict=True):
        torch.mul(some, scales_O, out=place)


def _reads_integers(x_TI: torch.Tensor, codes_OI: torch.Tensor) -> bool:
    """Whether torch's product of bfloat16 with int8, which widens in registers, is the faster one. It reads beyond the
    end of rows that are not a multiple of its vectors, so those never get there.
    """
    return (
        x_TI.shape[0] <= FEW_TOKENS and x_TI.dtype == torch.bfloat16 and codes_OI.dtype == torch.int8
        and x_TI.device.type == "cpu" and codes_OI.shape[0] % 64 == 0 and codes_OI.shape[1] % 64 == 0
    )  # fmt: skip


def scaled_linear(x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> torch.Tensor:
    """As `reference.tiled_linear` with W = codes * scales by rows; codes of a dtype whose numbers are exact in x's."""
    return _ScaledLinear.apply(x_TI, codes_OI, scales_O)  # pyright: ignore[reportReturnType]


def spans(length: int, other: int) -> Iterator[slice]:
    """Slices of an axis of ``length``, each with about `TILE_ELEMENTS` elements when it is ``other`` wide."""
    step = max(ALIGNMENT, TILE_ELEMENTS // max(1, other) // ALIGNMENT * ALIGNMENT)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def tiled_linear(x_TI: torch.Tensor, tile: Tile, out_features: int, few: Few | None = None) -> torch.Tensor:
    """As `reference.tiled_linear`: x W^T (T, out) in the dtype of x, with W (out, in) made by ``tile`` where needed;
    forward, ``few`` is tried first.
    """
    return _TiledLinear.apply(x_TI, tile, out_features, few)  # pyright: ignore[reportReturnType]
