"""int8 weights, one scale for each output: W[o, i] = codes[o, i] * scales[o], codes in -127..127, round to nearest.

Symmetric range and absolute maximum as scale: Dettmers et al. 2022 (LLM.int8()), section 2, by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from alpaca_lora.kernels.tiled import scaled_linear
from alpaca_lora.quantization.scheme import Part, Parts, Scheme, by_rows

LARGEST = 127


@dataclass(frozen=True)
class Int8(Scheme):
    """codes (out, in) int8, scales (out,) float32."""

    name: ClassVar[str] = "int8"

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {
            "codes": Part((out_features, in_features), torch.int8),
            "scales": Part((out_features,), torch.float32),
        }

    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        def some(rows_OI: torch.Tensor) -> dict[str, torch.Tensor]:
            scales_O = rows_OI.abs().amax(1) / LARGEST
            # a row of zeros has scale zero and codes zero
            codes_OI = (rows_OI / scales_O.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
            return {"codes": codes_OI.clamp_(-LARGEST, LARGEST).to(torch.int8), "scales": scales_O}

        return by_rows(weight_OI, name, some)

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        """x W^T = (x C^T) s. Codes are exact in bfloat16, where codes * scales would be rounded weight by weight; the
        products are added up in float32, rounded to the dtype of x, scaled in float32 and rounded again.
        """
        return scaled_linear(x_TI, parts["codes"], parts["scales"])

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        return (parts["codes"][rows, columns].float() * parts["scales"][rows, None]).to(dtype)
