"""FP4: its sixteen values from the format; codes and constants against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.quantization.fp4 import FP4
from tests.quantization import bitsandbytes_oracle as oracle


def test_values_are_a_sign_an_exponent_and_a_fraction() -> None:
    """Of e2m1 with bias 1 all are here but the subnormal, over the largest; the upper eight codes are negative."""
    normal = {(1 + fraction / 2) * 2.0 ** (exponent - 1) for exponent in (1, 2, 3) for fraction in (0, 1)}
    expected = {0.0, *(value / 6 for value in normal)}
    positive = set(FP4.values[:8])
    assert {value for value in positive if not any(abs(value - e) < 1e-12 for e in expected)} == {FP4.values[1]}
    assert FP4.values[1] == 0.0625 / 12
    assert FP4.values[8:] == tuple(-value if value else 0.0 for value in FP4.values[:8])


@pytest.mark.parametrize("shape", oracle.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_bit_equal_to_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    theirs = oracle.functional()
    for block_size in oracle.BLOCKS:
        for double_quant in (True, False):
            scheme = FP4(block_size, double_quant)
            for what, weight_OI in oracle.weights(shape):
                oracle.assert_equal(scheme, weight_OI.to(dtype), theirs, f"{what}, {scheme}")
