"""FP4: a sign, two bits of exponent, one of fraction, scaled so that the largest is 1; bitsandbytes' order of codes.

The smallest is a subnormal of 1/16 where the format's own would be 1/2 (of a largest of 12): bitsandbytes' choice, kept
so that codes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alpaca_lora.quantization.four_bit import FourBit

MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
LARGEST = 12.0


@dataclass(frozen=True)
class FP4(FourBit):
    """As `FourBit`."""

    name: ClassVar[str] = "fp4"
    values: ClassVar[tuple[float, ...]] = tuple(
        sign * magnitude / LARGEST if magnitude else 0.0 for sign in (1.0, -1.0) for magnitude in MAGNITUDES
    )
