"""NF4: its sixteen values from the definition; codes and constants against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.quantization.nf4 import NF4
from tests.quantization import bitsandbytes_oracle as oracle


def test_values_are_those_of_the_paper() -> None:
    """Dettmers et al. 2023, appendix E: quantiles of the normal distribution at even shares, 8 on the positive side, 7
    on the negative, zero; over the largest.
    """
    offset = 0.9677083  # the share that the largest stands for: the mean of 1 - 1/32 and 1 - 1/30
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    positive = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat((negative, torch.zeros(1), positive)).sort().values
    values /= values.max()
    torch.testing.assert_close(torch.tensor(NF4.values), values, rtol=0, atol=1e-6)
    assert NF4.values[7] == 0 and NF4.values[0] == -1 and NF4.values[15] == 1


@pytest.mark.parametrize("shape", oracle.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_bit_equal_to_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    theirs = oracle.functional()
    for block_size in oracle.BLOCKS:
        for double_quant in (True, False):
            scheme = NF4(block_size, double_quant)
            for what, weight_OI in oracle.weights(shape):
                oracle.assert_equal(scheme, weight_OI.to(dtype), theirs, f"{what}, {scheme}")


def test_the_oracle_sees_a_difference() -> None:
    theirs = oracle.functional()
    weight_OI = dict(oracle.weights((64, 64)))["normal"]

    class Rounded(NF4):
        values = (*NF4.values[:4], -0.2844, *NF4.values[5:])

    with pytest.raises(AssertionError, match="normal"):
        oracle.assert_equal(Rounded(), weight_OI, theirs, "normal")


def test_bits_of_a_weight() -> None:
    """4 for the code, 8 / 64 for its block, 32 / (64 256) for that one's: section 3 of the paper has 0.127."""
    assert NF4().bits_per_weight(4096, 4096) == pytest.approx(4.127, abs=5e-4)
    assert NF4(double_quant=False).bits_per_weight(4096, 4096) == 4.5
