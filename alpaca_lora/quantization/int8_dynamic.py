"""int8 weights and activations, these by each token's largest magnitude when they come: real integer products.

Weights as `int8.py`; activations per token as Dettmers et al. 2022 (LLM.int8(), section 2, "vector-wise quantization").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from alpaca_lora.kernels.integer import integer_linear
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.scheme import Parts


@dataclass(frozen=True)
class Int8Dynamic(Int8):
    """As `Int8`."""

    name: ClassVar[str] = "int8_dynamic"

    def apply(self, x_TI: torch.Tensor, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
        """round(x / a) C^T a s, exact in whole numbers; the gradient is that of x W^T."""
        return integer_linear(x_TI, parts["codes"], parts["scales"])
