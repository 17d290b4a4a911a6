"""Dropout masks as a pure function of who the row is: counter-based bits instead of a generator's state.

torch draws one number after another on most processors (10 ms for a mask of 2048 x 576, the product that uses it
takes 0.3 ms). Here each 32-bit word is hash(row key, column, salt) and gives two draws: a mask costs a few passes over
integers, can be made again in the backward pass instead of being kept, and does not depend on how rows are cut into
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Multipliers of the `lowbias32` integer hash (C. Wellons, "Prospecting for hash functions", 2018), as signed 32-bit.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
_INT32 = 1 << 32


def _signed(value: int) -> int:
    """`value` modulo 2^32 as a signed 32-bit integer."""
    value %= _INT32
    return value - _INT32 if value >= _INT32 // 2 else value


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """row_keys_T: int32, see `row_keys`. p: share of elements dropped. salt: which input of the model this is."""

    row_keys_T: torch.Tensor
    p: float
    salt: int


def _mix(h: torch.Tensor) -> torch.Tensor:
    """Hash int32 in place, without the last xor-shift: torch's shift keeps the sign, it would clear the top bit."""
    h.bitwise_xor_(h >> 16).mul_(_MULTIPLIER_1)
    return h.bitwise_xor_(h >> 15).mul_(_MULTIPLIER_2)


def row_keys(seed: int, step: int, example_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """int32 key of each token from (seed, step, row of the data, position in the row)."""
    keys_T = _mix((example_T * 0x9E3779B1 + seed * 0x85EBCA6B).to(torch.int32))
    keys_T = _mix(keys_T + positions_T.to(torch.int32))
    return _mix(keys_T + _signed(step * 0x27D4EB2F + 0x165667B1))


def keep_bits(key: DropoutKey, width: int) -> torch.Tensor:
    """(T, width) int16: -1 (all bits) where the element is kept, 0 where it is dropped, as a mask for `mask_bits`.

    An element is dropped with probability round(p * 32768) / 32768. Integer arithmetic only: a comparison alone takes
    longer on a processor than all of this (0.47 ms against 0.35 ms for 2048 x 576).
    """
    words = (width + 1) // 2
    columns = torch.arange(words, dtype=torch.int32, device=key.row_keys_T.device)
    columns = _mix(columns + _signed(key.salt * 0x9E3779B1))
    draws = _mix(key.row_keys_T[:, None] + columns[None, :]).view(torch.int16)
    threshold = round(key.p * 32768) - 16384
    # 15-bit draws, so that the subtraction cannot overflow: its sign is the comparison
    kept = draws.bitwise_right_shift_(1).neg_().add_(threshold - 1).bitwise_right_shift_(15)
    return kept if kept.shape[1] == width else kept[:, :width]


def keep_mask(key: DropoutKey, width: int) -> torch.Tensor:
    """`keep_bits` as bool: True where the element is kept."""
    return keep_bits(key, width) != 0


def mask_bits(x_TD: torch.Tensor, bits: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """x where `bits` are set, zero elsewhere; not rescaled."""
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x_TD.element_size()]
    raw, bits = x_TD.view(as_int), bits.to(as_int)
    return (raw.bitwise_and_(bits) if in_place else raw.bitwise_and(bits)).view(x_TD.dtype)
