"""Whatever the order in which tokens arrive, each sees what it would see in one uncached forward of its sequence."""

from __future__ import annotations

import random

import pytest
import torch

from alpaca_lora.inference.kv_cache import KVCache
from alpaca_lora.kernels import reference

H, K, E, SCALE = 6, 2, 8, 0.3


class Prefix:
    """Random keys and values of one layer, and how often they were asked for."""

    def __init__(self, length: int, kv_heads: int) -> None:
        self.length, self.asked = length, 0
        self.pair = torch.randn(length, kv_heads, E), torch.randn(length, kv_heads, E)

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self.asked += 1
        return [self.pair] * 2


class Stream:
    """One sequence's random q, k, v, and what full attention makes of them."""

    def __init__(
        self, length: int, window: int | None, heads: int, kv_heads: int, prefix: Prefix | None = None
    ) -> None:
        self.q, self.k, self.v = (torch.randn(length, n, E) for n in (heads, kv_heads, kv_heads))
        self.want = reference.attend_packed(self.q, self.k, self.v, [length], SCALE, window, prefix and prefix.pair)
        self.done, self.prefix = 0, prefix


def attend(
    cache: KVCache, streams: list[Stream], counts: list[tuple[int, int]], window: int | None, layer: int
) -> None:
    """Bring (slot, count) tokens and compare the result with full attention."""
    plan = cache.extend(counts)
    if (prefix := streams[0].prefix) is not None:
        plan = plan.with_prefix(prefix)
    rows = [slice(streams[slot].done, streams[slot].done + count) for slot, count in counts]
    parts = [[getattr(streams[slot], x)[r] for (slot, _), r in zip(counts, rows, strict=True)] for x in ("q", "k", "v")]
    q, k, v = (torch.cat(part) for part in parts)
    out = plan.attend(layer, q, k, v, SCALE, window)
    want = torch.cat([streams[slot].want[r] for (slot, _), r in zip(counts, rows, strict=True)])
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    for slot, count in counts:
        streams[slot].done += count


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("num_virtual", [0, 3])
def test_prefill_then_decode_of_unequal_sequences(
    window: int | None, heads: int, kv_heads: int, num_virtual: int
) -> None:
    torch.manual_seed(0)
    cache = KVCache(min_capacity=4)
    prefix = Prefix(num_virtual, kv_heads) if num_virtual else None
    streams = [Stream(n, window, heads, kv_heads, prefix) for n in (20, 16, 23)]
    slots = [cache.add() for _ in streams]
    attend(cache, streams, list(zip(slots, (7, 1, 11), strict=True)), window, 0)
    for _ in range(9):
        attend(cache, streams, [(slot, 1) for slot in slots], window, 0)
    assert cache.lengths == [16, 10, 20]  # virtual tokens do not count
    assert prefix is None or prefix.asked == 1


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_virtual", [0, 5])
def test_one_sequence_and_equal_sequences_need_no_mask(window: int | None, num_virtual: int) -> None:
    torch.manual_seed(1)
    prefix = Prefix(num_virtual, K) if num_virtual else None
    for num_streams in (1, 3):
        cache = KVCache(min_capacity=2)
        streams = [Stream(20, window, H, K, prefix) for _ in range(num_streams)]
        slots = [cache.add() for _ in streams]
        attend(cache, streams, [(slot, 8) for slot in slots], window, 0)
        for _ in range(12):
            attend(cache, streams, [(slot, 1) for slot in slots], window, 0)


@pytest.mark.parametrize("num_virtual", [0, 4])
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_chunks_joins_and_leaves(seed: int, num_virtual: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    window = rng.choice([None, 3, 9])
    prefix = Prefix(num_virtual, K) if num_virtual else None
    cache, streams = KVCache(min_capacity=2), []
    for _ in range(30):
        while len(streams) < 2 or (len(streams) < 5 and rng.random() < 0.3):
            assert cache.add() == len(streams)
            streams.append(Stream(rng.randint(5, 30), window, H, K, prefix))
        chosen = rng.sample(range(len(streams)), rng.randint(1, len(streams)))
        open_ = [(slot, len(streams[slot].want) - streams[slot].done) for slot in chosen]
        counts = [(slot, rng.randint(1, min(left, 6))) for slot, left in open_ if left]
        if rng.random() < 0.4:
            counts = [(s, 1) for s, stream in enumerate(streams) if stream.done < len(stream.want)]
        if counts:
            attend(cache, streams, counts, window, 0)
        if rng.random() < 0.3:
            slot = rng.randrange(len(streams))
            cache.remove(slot)
            streams[slot] = streams[-1]
            streams.pop()
        assert cache.lengths == [stream.done for stream in streams]


def test_layers_do_not_mix() -> None:
    torch.manual_seed(2)
    cache, plan_rows = KVCache(), 4
    slot = cache.add()
    a, b = Stream(5, None, H, K), Stream(5, None, H, K)
    plan = cache.extend([(slot, plan_rows)])
    for layer, s in enumerate((a, b)):
        plan.attend(layer, s.q[:4], s.k[:4], s.v[:4], SCALE, None)
    plan = cache.extend([(slot, 1)])
    for layer, s in enumerate((a, b)):
        torch.testing.assert_close(plan.attend(layer, s.q[4:], s.k[4:], s.v[4:], SCALE, None), s.want[4:])


def test_a_slot_used_again_forgets_what_it_held() -> None:
    torch.manual_seed(3)
    cache = KVCache()
    old, new, other = (Stream(12, None, H, K) for _ in range(3))
    cache.add()
    attend(cache, [old], [(0, 12)], None, 0)
    cache.remove(0)
    streams = [new, other]
    for _ in streams:
        cache.add()
    attend(cache, streams, [(0, 3), (1, 9)], None, 0)  # the shorter one's slot still holds old keys behind its end
    attend(cache, streams, [(0, 1), (1, 1)], None, 0)


def test_a_cleared_cache_takes_another_prefix_and_a_full_one_none() -> None:
    torch.manual_seed(4)
    cache, first, second = KVCache(min_capacity=2), Prefix(3, K), Prefix(6, K)
    for prefix in (first, second, None):
        stream = Stream(8, None, H, K, prefix)
        cache.add()
        attend(cache, [stream], [(0, 5)], None, 0)
        for _ in range(3):
            attend(cache, [stream], [(0, 1)], None, 0)
        if prefix is second:
            with pytest.raises(ValueError, match="another prefix"):
                cache.put_prefix(first)
        cache.clear()
    assert first.asked == second.asked == 1
