"""int8 weights, one scale for each output: W[o, i] = codes[o, i] * scales[o], codes in -127..127, round to nearest.

Symmetric range and absolute maximum as scale: Dettmers et al. 2022 (LLM.int8()), section 2, by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from alpaca_lora.quantization.scheme import Part, Parts, Scheme

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
        weight_OI = weight_OI.float()
        scales_O = weight_OI.abs().amax(1) / LARGEST
        # a row of zeros has scale zero and codes zero
        codes_OI = (weight_OI / scales_O.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
        return {"codes": codes_OI.clamp_(-LARGEST, LARGEST).to(torch.int8), "scales": scales_O}

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        return (parts["codes"][rows, columns].float() * parts["scales"][rows, None]).to(dtype)
