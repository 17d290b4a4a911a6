"""What NF4 and FP4 share: blocks of the flat weight, each code the nearest of sixteen values times the block's largest
magnitude; and that magnitude in eight bits (Dettmers et al. 2023, section 3).

Codes and constants are bit for bit those of bitsandbytes, so the arithmetic follows its order of operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.kernels.four_bit import BlockScales, decode_four_bit, encode_four_bit, four_bit_linear, pack_codes
from alpaca_lora.quantization.dynamic_map import dynamic_map, quantize_on_grid
from alpaca_lora.quantization.scheme import Part, Parts, Scheme

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096
NESTED_BLOCK = 256


@dataclass(frozen=True)
class FourBit(Scheme):
    """codes uint8 (out in / 2,), two to a byte; absmax float32 (blocks,), or with ``double_quant`` absmax_codes uint8
    (blocks,), absmax_scales float32 (blocks / 256,) and absmax_offset float32 (1,), their mean.
    """

    block_size: int = 64
    double_quant: bool = True

    roundings: ClassVar[frozenset[str]] = frozenset(("nearest", "gptq"))
    has_kernel_in_c: ClassVar[bool] = True
    values: ClassVar[tuple[float, ...]]  # the sixteen, in the order of their codes

    def problem(self) -> tuple[str, str] | None:
        size = self.block_size
        if size & (size - 1) or not SMALLEST_BLOCK <= size <= LARGEST_BLOCK:
            return "block_size", f"is {size}, expected a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}"
        return None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        numel = out_features * in_features
        blocks = -(-numel // self.block_size)
        codes = {"codes": Part((-(-numel // 2),), torch.uint8)}
        if not self.double_quant:
            return {**codes, "absmax": Part((blocks,), torch.float32)}
        return {
            **codes, "absmax_codes": Part((blocks,), torch.uint8),
            "absmax_scales": Part((-(-blocks // NESTED_BLOCK),), torch.float32),
            "absmax_offset": Part((1,), torch.float32),
        }  # fmt: skip

    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        codes, largest = encode_four_bit(weight_OI.reshape(-1), _table(type(self), weight_OI.device), self.block_size)
        if not bool(torch.isfinite(largest).all()):
            raise NumericalError("weights that are NaN or infinite", field=name)
        if not self.double_quant:
            return {"codes": codes, "absmax": largest}
        offset = largest.mean()
        if not bool(torch.isfinite(offset)):
            raise NumericalError("weights too large: the mean of their blocks' magnitudes is infinite", field=name)
        nested, scales = quantize_on_grid(largest - offset, NESTED_BLOCK)
        return {
            "codes": codes, "absmax_codes": nested, "absmax_scales": scales, "absmax_offset": offset.reshape(1)
        }  # fmt: skip

    def grid(self, weight_OI: torch.Tensor, *, name: str) -> FourBitGrid:
        parts = self.quantize(weight_OI, name=name)
        _, _, scales = self._stored(parts)
        values_K, codes_K = _table(type(self), weight_OI.device).sort()
        blocks = -(-weight_OI.numel() // self.block_size)
        scale_OI = scales.expanded(0, blocks).repeat_interleave(self.block_size)[: weight_OI.numel()].view_as(weight_OI)
        return FourBitGrid(parts, scale_OI, values_K, codes_K)

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        codes, table, scales = self._stored(parts)
        return decode_four_bit(codes, table, scales, None, shape, self.block_size, rows, columns, dtype)

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        codes, table, scales = self._stored(parts)
        return four_bit_linear(x_TI, codes, table, scales, None, shape, self.block_size)

    def _stored(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, BlockScales]:
        """(codes, the value of each, the scale of each block)."""
        codes = parts["codes"]
        if self.double_quant:
            map_ = _map(codes.device)
            scales = BlockScales(
                parts["absmax_scales"], parts["absmax_codes"], map_, parts["absmax_offset"], NESTED_BLOCK
            )
        else:
            scales = BlockScales(parts["absmax"])
        return codes, _table(type(self), codes.device), scales


@dataclass(frozen=True)
class FourBitGrid:
    """As `scheme.Grid`: the blocks' scales (out, in), and the sixteen values in rising order with their codes."""

    rounded: dict[str, torch.Tensor]  # the parts as rounding to nearest makes them: what is not codes stays
    scale_OI: torch.Tensor
    values_K: torch.Tensor
    codes_K: torch.Tensor

    def choose(self, column_O: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale_O = self.scale_OI[:, column]
        borders = (self.values_K[1:] + self.values_K[:-1]) / 2
        # a block of zeros has no scale; whatever its code is, it decodes to nothing
        place_O = torch.bucketize(column_O / torch.where(scale_O == 0, 1, scale_O), borders)
        return self.codes_K[place_O], self.values_K[place_O] * scale_O

    def parts(self, codes_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**self.rounded, "codes": pack_codes(codes_OI.to(torch.uint8))}


@cache
def _table(kind: type[FourBit], device: torch.device) -> torch.Tensor:
    """float32 (16,): the value of each code."""
    return torch.tensor(kind.values, dtype=torch.float32, device=device)


@cache
def _map(device: torch.device) -> torch.Tensor:
    return dynamic_map().to(device)
