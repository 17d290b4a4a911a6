"""FP8 storage with a scale for each output: W[o, i] = codes[o, i] scales[o], codes in e4m3 or e5m2.

Formats: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1; e4m3 as torch has it, without infinities.
The scale puts a row's largest magnitude at the format's largest number, so nothing overflows, and codes are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import ClassVar

import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.kernels.float8 import widen
from alpaca_lora.kernels.tiled import scaled_linear
from alpaca_lora.quantization.scheme import Part, Parts, Scheme, by_rows

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # constant
FIRST_NO_NUMBER = {"e4m3": 0x7F, "e5m2": 0x7C}  # constant: the least code, sign off, that is NaN or infinite


@dataclass(frozen=True)
class FP8(Scheme):
    """codes (out, in) float8, scales (out,) float32."""

    name: ClassVar[str] = "fp8"
    format: str = "e4m3"

    def problem(self) -> tuple[str, str] | None:
        return None if self.format in FORMATS else ("format", f"is {self.format!r}, expected {' or '.join(FORMATS)}")

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {
            "codes": Part((out_features, in_features), FORMATS[self.format]),
            "scales": Part((out_features,), torch.float32),
        }

    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        dtype = FORMATS[self.format]
        largest = torch.finfo(dtype).max

        def some(rows_OI: torch.Tensor) -> dict[str, torch.Tensor]:
            scales_O = rows_OI.abs().amax(1) / largest
            scaled_OI = rows_OI / scales_O.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            return {"codes": scaled_OI.clamp_(-largest, largest).to(dtype), "scales": scales_O}

        return by_rows(weight_OI, name, some)

    def check_parts(self, parts: Parts, *, name: str, file: str | PathLike[str]) -> None:
        """As `Scheme.check_parts`, for codes too: both formats can say NaN."""
        super().check_parts(parts, name=name, file=file)
        first = FIRST_NO_NUMBER[self.format]
        if bool(((parts["codes"].view(torch.uint8) & 0x7F) >= first).any()):
            raise NumericalError("NaN or infinite", file=file, field=f"{name}.codes", fix="quantize the model again")

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        """x W^T = (x C^T) s: codes are exact in bfloat16 (e4m3 has three bits of fraction, e5m2 two)."""
        return scaled_linear(x_TI, parts["codes"], parts["scales"])

    def tile(
        self, parts: Parts, shape: tuple[int, int], rows: slice, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        return (widen(parts["codes"][rows, columns], torch.float32) * parts["scales"][rows, None]).to(dtype)
