"""int4 in groups: W[o, i] = (codes[o, i] - zero[o, g]) scale[o, g] for the group g of inputs that i lies in.

Asymmetric: the range from the smallest (at most 0) to the largest (at least 0) is cut into fifteen steps. Symmetric:
zero is 8, and the scale, which may be negative, puts the weight of largest magnitude at code 0, so that no code is
wasted; the largest on the other side is at most one step short. On normal weights in groups of 128 the mean squared
error is 0.0101 (asymmetric) and 0.0107 of the weights' square, against 0.0138 with the largest magnitude over 7 as
scale.

Scales are rounded to float16 before the codes are chosen, so that the codes are the best for the scale that is stored.
With ``input_scales`` the decoded weight is divided by a factor for each input (Lin et al. 2023, AWQ, equation 4:
Q(W s) s^-1).

Made elsewhere: column by column on a `grid` (GPTQ); or `group_parameters` of each group, `round_to_codes`, then `pack`
(AWQ).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.four_bit import BlockScales, decode_four_bit, multiply_few, pack_codes
from alpaca_lora.kernels.tiled import constant_columns, tiled_linear
from alpaca_lora.quantization.scheme import Part, Parts, Scheme, by_rows

LEVELS = 15  # steps between the smallest and the largest code
MIDDLE = 8
TINY = 2.0**-24  # smallest float16: a scale below it would be stored as zero


@dataclass(frozen=True)
class Int4(Scheme):
    """codes uint8 (out in / 2,), two to a byte, high half first; scales float16 (out, groups); zeros uint8 (out,
    groups) unless symmetric; input_scales float32 (in,) if set.
    """

    name: ClassVar[str] = "int4"
    roundings: ClassVar[frozenset[str]] = frozenset(("nearest", "gptq", "awq"))
    has_kernel_in_c: ClassVar[bool] = True
    group_size: int = 128
    symmetric: bool = False
    input_scales: bool = False

    def problem(self) -> tuple[str, str] | None:
        if self.group_size < 2 or self.group_size % 2:
            return "group_size", f"is {self.group_size}, expected an even number of inputs"
        return None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        groups = in_features // self.group_size
        if groups * self.group_size != in_features:
            whole = [n for n in range(2, in_features + 1, 2) if in_features % n == 0]
            nearest = sorted(whole, key=lambda n: abs(n - self.group_size))[:3]
            fix = f"nearest: {', '.join(map(str, sorted(nearest)))}" if nearest else "keep this linear dense"
            raise ConfigError(
                f"{self.group_size} does not divide the {in_features} inputs of a linear of {out_features} x "
                f"{in_features}", field="group_size", fix=fix,
            )  # fmt: skip
        parts = {
            "codes": Part((out_features * in_features // 2,), torch.uint8),
            "scales": Part((out_features, groups), torch.float16),
        }
        if not self.symmetric:
            parts["zeros"] = Part((out_features, groups), torch.uint8)
        if self.input_scales:
            parts["input_scales"] = Part((in_features,), torch.float32)
        return parts

    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        """Round to nearest; input scales are ones."""

        def some(rows_OI: torch.Tensor) -> dict[str, torch.Tensor]:
            grouped_OGN = rows_OI.unflatten(1, (-1, self.group_size))
            scale_OG, zero_OG = self.group_parameters(grouped_OGN)
            codes_OGN = self.round_to_codes(grouped_OGN, scale_OG[..., None], zero_OG[..., None])
            return self.pack(codes_OGN.flatten(1), scale_OG, zero_OG)

        parts = by_rows(weight_OI, name, some)
        if self.input_scales:
            parts["input_scales"] = torch.ones(weight_OI.shape[1], device=weight_OI.device)
        return parts

    def grid(self, weight_OI: torch.Tensor, *, name: str) -> Int4Grid:
        return Int4Grid(self, *self.group_parameters(weight_OI.float().unflatten(1, (-1, self.group_size))))

    def group_parameters(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero) float32 of weights (..., group): the last axis shares them. The scale is a float16 number other
        than zero.
        """
        low, high = group.amin(-1).clamp(max=0), group.amax(-1).clamp(min=0)
        if self.symmetric:
            scale = torch.where(-low > high, low, high) / -MIDDLE
            return _stored(scale), torch.full_like(scale, MIDDLE)
        scale = _stored((high - low) / LEVELS)
        return scale, (-low / scale).round_().clamp_(0, LEVELS)

    def round_to_codes(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes, float32 whole numbers from 0 to 15, nearest to weight / scale + zero."""
        return (weight / scale + zero).round_().clamp_(0, LEVELS)

    def pack(self, codes_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parts of codes (out, in) and of the scale and zero point of each group."""
        parts = {"codes": pack_codes(codes_OI.to(torch.uint8)), "scales": scale_OG.to(torch.float16)}
        if not self.symmetric:
            parts["zeros"] = zero_OG.to(torch.uint8)
        return parts

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        if self.input_scales:  # dividing the inputs costs T in, dividing the weight out in
            x_TI = constant_columns(x_TI, parts["input_scales"].reciprocal())
        dtype = x_TI.dtype  # what the functions hold lives until backward: not the activations
        table = _table(self.symmetric).to(x_TI.device)

        def few(some_TI: torch.Tensor) -> torch.Tensor | None:
            zeros = None if self.symmetric else parts["zeros"].view(-1)
            scales = BlockScales(parts["scales"].view(-1))
            return multiply_few(some_TI, parts["codes"], table, scales, zeros, shape, self.group_size)

        return tiled_linear(
            x_TI, lambda rows, columns: self._decoded(parts, shape, rows, columns, dtype, reuse=True), shape[0], few
        )

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        if not self.input_scales:
            return self._decoded(parts, shape, rows, columns, dtype)
        tile = self._decoded(parts, shape, rows, columns, torch.float32)
        return tile.div_(parts["input_scales"][columns]).to(dtype)

    def _decoded(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype, *,
        reuse: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """(codes - zero) scale of a tile, without the input scales."""
        # whole rows of groups: what is decoded shares its first row with the scales that are handed over
        scales = BlockScales(parts["scales"][rows].view(-1))
        zeros = None if self.symmetric else parts["zeros"][rows].view(-1)
        row_bytes, count = shape[1] // 2, rows.stop - rows.start
        codes = parts["codes"][rows.start * row_bytes : rows.stop * row_bytes]
        return decode_four_bit(
            codes, _table(self.symmetric).to(codes.device), scales, zeros, (count, shape[1]), self.group_size,
            slice(0, count), columns, dtype, reuse=reuse,
        )  # fmt: skip


@dataclass(frozen=True)
class Int4Grid:
    """As `scheme.Grid`: the scale and zero point of each group."""

    scheme: Int4
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor

    def choose(self, column_O: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = column // self.scheme.group_size
        scale_O, zero_O = self.scale_OG[:, group], self.zero_OG[:, group]
        code_O = self.scheme.round_to_codes(column_O, scale_O, zero_O)
        return code_O, (code_O - zero_O) * scale_O

    def parts(self, codes_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.scheme.pack(codes_OI, self.scale_OG, self.zero_OG)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """The float16 number nearest to a scale, as float32; its magnitude neither zero nor infinite."""
    bounded = scale.abs().clamp(TINY, torch.finfo(torch.float16).max)
    return torch.copysign(bounded.to(torch.float16).float(), scale)


@cache
def _table(symmetric: bool) -> torch.Tensor:
    """float32 (16,): a code is its own value, less the zero point where that is the same everywhere."""
    return torch.arange(16, dtype=torch.float32) - (MIDDLE if symmetric else 0)
