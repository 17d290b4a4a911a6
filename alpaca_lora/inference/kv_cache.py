"""Where keys and values are kept: per layer (blocks, block, K, E) each. Knows no model, no text and no sequences.

On a processor memory is taken from the system only when a block is first written, so a large cache costs nothing until
it is used; blocks that were used are used again before new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from alpaca_lora.device import available_memory_bytes
from alpaca_lora.errors import UserError
from alpaca_lora.inference.block_pool import BLOCK_SIZE
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.config import ModelConfig

AVAILABLE_SHARE = 0.25  # of the memory that can be taken when the engine is made: the rest is for activations, adapters
ALIGNMENT = 64  # bytes, a line of the processor's cache


class KVCache:
    """``keys[layer]`` and ``values[layer]``; zeros at first."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, *, dtype: torch.dtype, device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:  # fmt: skip
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.keys = [zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.values = [zeros(shape, dtype, device) for _ in range(config.num_layers)]

    @torch.inference_mode()
    def put(self, blocks: np.ndarray, first: int, pairs: Sequence[KeysValues]) -> None:
        """Store keys and values (N, K, E) of every layer at the places from ``first`` on of a sequence."""
        places = torch.from_numpy(places_of(blocks, first, len(pairs[0][0]), self.block_size)).to(self.device)
        for keys, values, (k_NKE, v_NKE) in zip(self.keys, self.values, pairs, strict=True):
            keys.flatten(0, 1)[places] = k_NKE.to(keys.dtype)
            values.flatten(0, 1)[places] = v_NKE.to(values.dtype)


def places_of(blocks: np.ndarray, start: int, count: int, block_size: int) -> np.ndarray:
    """int64: where ``count`` places of a sequence from ``start`` on lie, counted over all blocks of the cache."""
    if count == 1:
        return np.array([int(blocks[start // block_size]) * block_size + start % block_size])
    place = np.arange(start, start + count)
    return blocks[place // block_size].astype(np.int64) * block_size + place % block_size


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a processor of memory that nothing has touched, which torch's own zeros have."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    skipped = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[skipped : skipped + num_bytes]).view(dtype).view(shape)


def choose_num_blocks(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, cache_bytes: int | None, num_sequences: int,
    num_places: int,
) -> int:  # fmt: skip
    """How many blocks fit ``cache_bytes`` (None: `AVAILABLE_SHARE` of the memory that can be taken now), and no more
    than hold ``num_sequences`` of ``num_places`` each. UserError when not even one does.
    """
    of_block = 2 * config.num_layers * BLOCK_SIZE * config.num_key_value_heads * config.head_dim * dtype.itemsize
    budget = int(AVAILABLE_SHARE * available_memory_bytes(device)) if cache_bytes is None else cache_bytes
    if budget < of_block:
        raise UserError(
            f"is {budget} bytes", field="cache_bytes", expected=f"at least the {of_block} of {BLOCK_SIZE} tokens",
        )  # fmt: skip
    return min(budget // of_block, num_sequences * -(-num_places // BLOCK_SIZE))
