"""float8 numbers in a wider dtype, by tables: torch converts them one by one, fourteen times slower."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _table(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of all 256 codes."""
    return torch.arange(256, dtype=torch.uint8).view(stored).to(dtype)


@cache
def _pairs(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The two numbers of all 65,536 pairs of codes, as one whole number each: half as many look-ups."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    numbers = _table(stored, dtype)[codes.int()]
    return numbers.view(torch.int64 if dtype.itemsize == 4 else torch.int32)


def widen(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes.to(dtype)`` of integers or float8 numbers, exactly."""
    if codes.dtype.itemsize != 1 or not codes.dtype.is_floating_point or codes.device.type != "cpu":
        return codes.to(dtype)
    flat = codes.contiguous().view(torch.uint8).view(-1)
    if flat.numel() % 2 or flat.storage_offset() % 2 or dtype.itemsize not in (2, 4):
        return _table(codes.dtype, dtype).index_select(0, flat.int()).view(codes.shape)
    found = _pairs(codes.dtype, dtype).index_select(0, flat.view(torch.uint16).int())
    return found.view(dtype).view(codes.shape)
