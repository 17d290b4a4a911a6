"""Eight bits for numbers of very different sizes: the dynamic map (Dettmers et al. 2022, "8-bit Optimizers", section 2)
and quantization in blocks with it. Used for the scales of four-bit weights and for AdamW's averages.
"""

from __future__ import annotations

from functools import cache

import torch

GRID = 65535
EXPONENTS = 7  # decades, 10^-6 to 10^0; the higher one, the more values it has


@cache
def dynamic_map(signed: bool = True) -> torch.Tensor:
    """float32 (256,), rising, from -1 (unsigned: 0) to 1.

    Decade 10^(i-6) has 2^i (unsigned: 2^(i+1)) values, midpoints of equal steps from 0.1 to 1, with both signs; zero
    and 1 besides.
    """
    values: list[float] = [0.0, 1.0]
    for i in range(EXPONENTS):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        middles = (10 ** (i - EXPONENTS + 1)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _midpoints(signed: bool) -> torch.Tensor:
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2


def quantize_blockwise(
    values_N: torch.Tensor, block_size: int, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 (N,), largest magnitude of each block float32) of float32 values; the codes are those of the nearest
    value of the map.
    """
    count = values_N.numel()
    blocks = -(-count // block_size)
    padded = torch.nn.functional.pad(values_N, (0, blocks * block_size - count)).view(blocks, block_size)
    largest = padded.abs().amax(1)
    scaled = padded * (1.0 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    codes = torch.bucketize(scaled.view(-1)[:count], _midpoints(signed).to(values_N.device), out_int32=True)
    return codes.to(torch.uint8), largest


@cache
def _gridded() -> torch.Tensor:
    """uint8 (65536,): the code of each point of an even grid from -1 to 1."""
    points = (-1 + 2 * torch.arange(GRID + 1, dtype=torch.float64) / GRID).float()
    return torch.bucketize(points, _midpoints(True)).to(torch.uint8)


def quantize_on_grid(values_N: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_blockwise`, but a number is first moved to the nearest of 65,536 points from -1 to 1, as
    bitsandbytes' processor path does, and bit for bit with its arithmetic; a block of zeros has codes zero. Where two
    codes are about as near it may be the other one.
    """
    count = values_N.numel()
    blocks = -(-count // block_size)
    padded = torch.nn.functional.pad(values_N, (0, blocks * block_size - count)).view(blocks, block_size)
    largest = padded.abs().amax(1)
    # zeros times infinity, in a block of zeros, is no number
    scaled = (padded * (1.0 / largest)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1).view(-1)[:count]
    points = scaled.add_(1).mul_(GRID / 2).add_(0.5).int()
    return _gridded().to(values_N.device)[points], largest


def dequantize_blockwise(
    codes_N: torch.Tensor, largest: torch.Tensor, block_size: int, signed: bool = True
) -> torch.Tensor:
    """float32 (N,) of what `quantize_blockwise` gave."""
    values = dynamic_map(signed).to(codes_N.device).index_select(0, codes_N.int())
    return values * largest.repeat_interleave(block_size)[: len(codes_N)]
