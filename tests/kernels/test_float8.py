"""float8 numbers read by tables are those that torch reads."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.kernels.float8 import widen

STORED = pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def assert_read(codes: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(widen(codes, dtype), codes.to(dtype), rtol=0, atol=0, equal_nan=True)


@STORED
@WIDE
def test_every_pair_of_codes(stored: torch.dtype, dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    assert_read(torch.cartesian_prod(numbers, numbers).view(stored), dtype)


@STORED
@WIDE
def test_odd_counts_and_places(stored: torch.dtype, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(stored)
    for some in (codes[:0], codes[:1], codes[3:10], codes[3:11], codes.view(16, 16)[:, 3:9], codes.view(16, 16).t()):
        assert_read(some, dtype)


@STORED
def test_where_denormal_numbers_are_switched_off(stored: torch.dtype) -> None:
    """The smallest float8 numbers are no denormals once they are wide."""
    codes = torch.arange(1, 4, dtype=torch.uint8).view(stored)
    expected = codes.double()
    torch.set_flush_denormal(True)
    try:
        found = widen(codes, torch.float32).double()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected) and bool((found > 0).all())


def test_integers_pass_through() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    assert torch.equal(widen(codes, torch.bfloat16).int(), codes.int())
