"""Memory that costs nothing before it is used, and where a sequence's places lie in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alpaca_lora.device import current_memory_bytes
from alpaca_lora.errors import UserError
from alpaca_lora.inference.block_pool import BLOCK_SIZE
from alpaca_lora.inference.kv_cache import AVAILABLE_SHARE, KVCache, choose_num_blocks, places_of, zeros
from tests.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(("start", "count"), [(0, 1), (3, 1), (4, 1), (0, 4), (2, 7), (9, 3), (11, 1)])
def test_places_follow_the_blocks(start: int, count: int) -> None:
    blocks = np.array([5, 2, 9], np.int32)
    everywhere = [block * 4 + offset for block in blocks.tolist() for offset in range(4)]
    found = places_of(blocks, start, count, 4)
    assert found.dtype == np.int64 and found.tolist() == everywhere[start : start + count]


def test_what_is_put_lies_at_its_places_in_every_layer() -> None:
    cache = KVCache(tiny_config(), 6, dtype=torch.bfloat16, device=CPU)
    blocks = np.array([4, 1], np.int32)
    pairs = [(torch.randn(20, 2, 8), torch.randn(20, 2, 8)) for _ in range(2)]
    cache.put(blocks, 5, pairs)
    for layer, pair in enumerate(pairs):
        for stored, x in zip((cache.keys[layer], cache.values[layer]), pair, strict=True):
            assert stored.shape == (6, BLOCK_SIZE, 2, 8) and stored.dtype == torch.bfloat16
            assert torch.equal(stored[[4, 1]].flatten(0, 1)[5:25], x.bfloat16())
            assert stored.count_nonzero() == x.bfloat16().count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_aligned_and_take_memory_only_when_they_are_written(dtype: torch.dtype) -> None:
    before = current_memory_bytes()
    one = zeros((1 << 20, 256), dtype, CPU)
    assert one.shape == (1 << 20, 256) and one.dtype == dtype and one.is_contiguous()
    assert one.data_ptr() % 64 == 0
    assert current_memory_bytes() - before < 16 << 20  # of 512 MB and more
    assert not one[:100].any() and not one[-100:].any()
    one[: 1 << 18] = 1
    assert current_memory_bytes() - before > 100 << 20


def test_the_number_of_blocks_comes_from_bytes_and_is_bounded_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    of_block = 2 * 2 * BLOCK_SIZE * 2 * 8 * 4  # keys and values, layers, places, heads, width, float32

    def chosen(cache_bytes: int | None, num_places: int = 10**6) -> int:
        return choose_num_blocks(
            config, torch.float32, CPU, cache_bytes=cache_bytes, num_sequences=2, num_places=num_places
        )

    cache = KVCache(config, 3, dtype=torch.float32, device=CPU)
    assert sum(one.nbytes for one in (*cache.keys, *cache.values)) == 3 * of_block
    assert chosen(10 * of_block) == 10 == chosen(11 * of_block - 1)
    assert chosen(10 * of_block, 17) == 4
    monkeypatch.setattr("alpaca_lora.inference.kv_cache.available_memory_bytes", lambda device: 100 * of_block)
    assert chosen(None) == int(100 * AVAILABLE_SHARE)
    with pytest.raises(UserError, match=f"cache_bytes: is {of_block - 1} bytes, expected at least the {of_block}"):
        chosen(of_block - 1)
