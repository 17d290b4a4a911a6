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
from alpaca_lora.kernels.four_bit import BlockScales, decode_four_bit, pack_codes
from alpaca_lora.quantization.dynamic_map import dynamic_map, quantize_on_grid
from alpaca_lora.quantization.scheme import Part, Parts, Scheme

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096
NESTED_BLOCK = 256
TINY = 1e-38  # a block of zeros is divided by it
CHUNK_BLOCKS = 2**14  # blocks quantized at a time: temporaries of 4 MB for blocks of 64


@dataclass(frozen=True)
class FourBit(Scheme):
    """codes uint8 (out in / 2,), two to a byte; absmax float32 (blocks,), or with ``double_quant`` absmax_codes uint8
    (blocks,), absmax_scales float32 (blocks / 256,) and absmax_offset float32 (1,), their mean.
    """

    block_size: int = 64
    double_quant: bool = True

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
        flat = weight_OI.reshape(-1)
        step = self.block_size * CHUNK_BLOCKS
        packed, absmax = [], []
        for start in range(0, flat.numel(), step):
            codes, largest = self._quantize_some(flat[start : start + step].float(), name)
            packed.append(pack_codes(codes))
            absmax.append(largest)
        codes, largest = torch.cat(packed), torch.cat(absmax)
        if not self.double_quant:
            return {"codes": codes, "absmax": largest}
        offset = largest.mean()
        nested, scales = quantize_on_grid(largest - offset, NESTED_BLOCK)
        return {
            "codes": codes, "absmax_codes": nested, "absmax_scales": scales, "absmax_offset": offset.reshape(1)
        }  # fmt: skip

    def _quantize_some(self, flat: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes uint8, largest magnitude of each block) of whole blocks and perhaps a shorter last one."""
        bounds, order = _bounds(type(self))
        whole = flat.numel() // self.block_size * self.block_size
        blocks = flat[:whole].view(-1, self.block_size)
        largest = blocks.abs().amax(1)
        scaled = (blocks * (1.0 / largest.clamp(min=TINY))[:, None]).clamp_(-1, 1).view(-1)
        if whole < flat.numel():
            rest = flat[whole:].abs().max().clamp(min=TINY)
            largest = torch.cat((largest, rest[None]))
            scaled = torch.cat((scaled, (flat[whole:] / rest).clamp(-1, 1)))
        if scaled.numel() % 2:  # half a byte is left over: the code of zero
            scaled = torch.cat((scaled, scaled.new_zeros(1)))
        if not bool(torch.isfinite(largest).all()):
            raise NumericalError("weights that are NaN or infinite", field=name)
        codes = torch.bucketize(scaled, bounds.to(flat.device), out_int32=True)
        return order.to(flat.device)[codes], largest

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        codes = parts["codes"]
        if self.double_quant:
            map_ = dynamic_map().to(codes.device)
            scales = BlockScales(parts["absmax_scales"], parts["absmax_codes"], map_, parts["absmax_offset"])
        else:
            scales = BlockScales(parts["absmax"])
        table = _table(type(self)).to(codes.device)
        return decode_four_bit(codes, table, scales, None, shape, self.block_size, rows, columns, dtype)


@cache
def _table(kind: type[FourBit]) -> torch.Tensor:
    """float32 (16,): the value of each code."""
    return torch.tensor(kind.values, dtype=torch.float32)


@cache
def _bounds(kind: type[FourBit]) -> tuple[torch.Tensor, torch.Tensor]:
    """(midpoints between neighbouring values float32 (15,), the code of each value in rising order uint8 (16,))."""
    values = _table(kind)
    order = torch.argsort(values)
    return (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)
