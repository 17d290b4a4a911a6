"""Whatever the order in which tokens arrive, each sees what it would see in one uncached forward of its sequence."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from alpaca_lora.inference.kv_cache import KVCache
from alpaca_lora.inference.paged_plan import QUERIES, PagedPlan, Segment
from alpaca_lora.kernels import reference
from tests.tiny import tiny_config

E, SCALE = 8, 0.3
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (5, 1)])


class Pages:
    """A cache of one layer and more blocks than needed, full of NaN: what nobody wrote must never be read."""

    def __init__(self, heads: int = 6, kv_heads: int = 2, window: int | None = None, num_virtual: int = 0) -> None:
        config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=E, num_layers=1)
        self.cache = KVCache(config, 400, dtype=torch.float32, device=torch.device("cpu"), block_size=4)
        for stored in (*self.cache.keys, *self.cache.values):
            stored.fill_(float("nan"))
        self.free = random.Random(0).sample(range(400), 400)
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.prefix = None
        if num_virtual:
            self.prefix = torch.randn(num_virtual, kv_heads, E), torch.randn(num_virtual, kv_heads, E)

    def stream(self, length: int) -> Stream:
        return Stream(self, length)

    def attend(self, pieces: list[tuple[Stream, int]]) -> None:
        """Bring the next so many tokens of each stream and compare with full attention."""
        segments, rows = [], []
        for stream, count in pieces:
            segments.append(Segment(stream.blocks, stream.num_virtual + stream.done, count))
            rows.append(slice(stream.done, stream.done + count))
        q, k, v = (
            torch.cat([getattr(stream, x)[some] for (stream, _), some in zip(pieces, rows, strict=True)]) for x in "qkv"
        )
        out = PagedPlan(self.cache, segments).attend(0, q, k, v, SCALE, self.window)
        want = torch.cat([stream.want[some] for (stream, _), some in zip(pieces, rows, strict=True)])
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
        for stream, count in pieces:
            stream.done += count


class Stream:
    """One sequence's random q, k, v, and what full attention makes of them."""

    def __init__(self, pages: Pages, length: int) -> None:
        self.q, self.k, self.v = (torch.randn(length, n, E) for n in (pages.heads, pages.kv_heads, pages.kv_heads))
        prefix = pages.prefix
        self.want = reference.attend_packed(self.q, self.k, self.v, [length], SCALE, pages.window, prefix)
        self.done, self.num_virtual = 0, 0 if prefix is None else len(prefix[0])
        num_blocks = -(-(self.num_virtual + length) // 4)
        self.blocks = np.array([pages.free.pop() for _ in range(num_blocks)], np.int32)
        if prefix is not None:
            pages.cache.put(self.blocks, 0, [prefix])


@HEADS
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("num_virtual", [0, 3, 4])
def test_prefill_then_decode_of_unequal_sequences(
    window: int | None, heads: int, kv_heads: int, num_virtual: int
) -> None:
    torch.manual_seed(0)
    pages = Pages(heads, kv_heads, window, num_virtual)
    streams = [pages.stream(n) for n in (20, 16, 23)]
    pages.attend(list(zip(streams, (7, 1, 11), strict=True)))
    for _ in range(9):
        pages.attend([(stream, 1) for stream in streams])


@HEADS
@pytest.mark.parametrize("window", [None, 6])
def test_all_three_roads_in_one_step(window: int | None, heads: int, kv_heads: int) -> None:
    torch.manual_seed(1)
    pages = Pages(heads, kv_heads, window)
    decoding, going_on, beginning, other = (pages.stream(20) for _ in range(4))
    pages.attend([(decoding, 5), (going_on, 3)])
    pages.attend([(beginning, 6), (decoding, 1), (going_on, 7), (other, 1)])
    pages.attend([(decoding, 1), (beginning, 1), (other, 4), (going_on, 1)])


@pytest.mark.parametrize("num_virtual", [0, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_chunks(seed: int, num_virtual: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pages = Pages(window=rng.choice([None, 3, 9]), num_virtual=num_virtual)
    streams: list[Stream] = []
    for _ in range(30):
        while len(streams) < 2 or (len(streams) < 5 and rng.random() < 0.3):
            streams.append(pages.stream(rng.randint(5, 30)))
        chosen = rng.sample(streams, rng.randint(1, len(streams)))
        pieces = [(s, 1 if rng.random() < 0.5 else rng.randint(1, min(6, len(s.want) - s.done))) for s in chosen]
        pages.attend(pieces)
        for stream in [s for s in streams if s.done == len(s.want)]:
            pages.free[:0] = stream.blocks.tolist()
            streams.remove(stream)


@pytest.mark.parametrize("window", [None, 7, QUERIES + 50])
def test_a_long_chunk_behind_others_is_cut_into_pieces(window: int | None) -> None:
    torch.manual_seed(2)
    pages = Pages(window=window)
    stream = pages.stream(2 * QUERIES + 90)
    pages.attend([(stream, 30)])
    pages.attend([(stream, 2 * QUERIES + 1)])
    pages.attend([(stream, 59)])


def test_a_sequence_may_begin_with_blocks_that_another_one_fills_in_the_same_step() -> None:
    torch.manual_seed(3)
    pages = Pages()
    first, second, third = (pages.stream(12) for _ in range(3))
    for stream in (second, third):
        for x in "qkv":
            getattr(stream, x)[:8] = getattr(first, x)[:8]
        stream.want = reference.attend_packed(stream.q, stream.k, stream.v, [12], SCALE)
        stream.blocks[:2], stream.done = first.blocks[:2], 8
    pages.attend([(second, 4), (first, 12), (third, 1)])


def test_layers_do_not_mix() -> None:
    torch.manual_seed(4)
    cache = KVCache(tiny_config(num_attention_heads=6, head_dim=E), 5, dtype=torch.float32, device=torch.device("cpu"))
    pages = Pages()
    streams = [pages.stream(5), pages.stream(5)]
    blocks = np.array([3], np.int32)
    for start, count in ((0, 4), (4, 1)):
        plan, rows = PagedPlan(cache, [Segment(blocks, start, count)]), slice(start, start + count)
        for layer, s in enumerate(streams):
            out = plan.attend(layer, s.q[rows], s.k[rows], s.v[rows], SCALE, None)
            torch.testing.assert_close(out, s.want[rows])


def test_numbers_that_are_not_finite_stay_in_their_sequence() -> None:
    """Decoded, continued and packed beside one whose keys and values are NaN, the others do not change by a bit."""
    torch.manual_seed(5)
    outs = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(6)
        pages = Pages()
        q, k, v = torch.randn(23, 6, E), torch.randn(23, 2, E), torch.randn(23, 2, E)
        k[8:15] += poison
        v[8:15] += poison
        blocks = [np.array(b, np.int32) for b in ([1, 2, 8], [3, 4, 9], [5, 6, 7])]
        found = []
        for starts, counts in (((0, 0, 0), (8, 7, 6)), ((8, 7, 6), (1, 1, 1)), ((9, 8, 7), (1, 1, 3))):
            segments = [Segment(b, s, c) for b, s, c in zip(blocks, starts, counts, strict=True)]
            n = sum(counts)
            out = PagedPlan(pages.cache, segments).attend(0, q[:n], k[:n], v[:n], SCALE, None)
            parts = out.split(counts)
            found += [parts[0], parts[2]]
            poisoned = not bool(torch.isfinite(parts[1]).all())
            assert poisoned == math.isnan(poison)
        outs.append(torch.cat(found))
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()
