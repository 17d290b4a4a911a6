"""int8 weights and activations, these by one scale for all tokens that was found on sample rows: nothing is measured
when the model runs. Activations beyond the range are clipped to its end.

Weights as `int8.py`; ranges seen on data as Jacob et al. 2018, section 3.1, and Nagel et al. 2021, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.kernels.integer import integer_linear
from alpaca_lora.quantization.int8 import LARGEST, Int8
from alpaca_lora.quantization.observers import OBSERVERS, observe
from alpaca_lora.quantization.scheme import Part, Parts


@dataclass(frozen=True)
class Int8Static(Int8):
    """As `Int8`, and input_scale float32 (1,)."""

    name: ClassVar[str] = "int8_static"
    needs_calibration: ClassVar[bool] = True
    observer: str = "mse"
    percentile: float = 99.9

    def problem(self) -> tuple[str, str] | None:
        if self.observer not in OBSERVERS:
            return "observer", f"is {self.observer!r}, expected one of {', '.join(OBSERVERS)}"
        if not 50 < self.percentile <= 100:
            return "percentile", f"is {self.percentile:g}, expected more than 50, at most 100"
        return None

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        return {**super().parts(out_features, in_features), "input_scale": Part((1,), torch.float32)}

    def quantize(self, weight_OI: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
        raise ConfigError(
            f"scheme {self.name} is made by running the model on rows ({name})", field="calibration_data",
            fix="use the quantize command with --calibration_data, or scheme int8_dynamic",
        )  # fmt: skip

    def quantize_calibrated(
        self, weight_OI: torch.Tensor, inputs: Sequence[torch.Tensor], *, name: str
    ) -> dict[str, torch.Tensor]:
        """NumericalError naming the linear when its inputs are not finite, or all zero: no scale fits later ones."""
        largest = observe(inputs, self.observer, self.percentile, name=name)
        scale = largest / LARGEST
        if scale < torch.finfo(torch.float32).tiny:
            raise NumericalError(
                "activations that are all zero on the calibration rows", field=name, fix="give other calibration rows"
            )
        parts = super().quantize(weight_OI, name=name)
        return {**parts, "input_scale": torch.tensor([scale], device=weight_OI.device)}

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        """clip(round(x / a)) C^T a s, exact in whole numbers; the gradient is that of x W^T."""
        return integer_linear(x_TI, parts["codes"], parts["scales"], parts["input_scale"])
