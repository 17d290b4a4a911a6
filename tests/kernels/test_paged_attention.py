"""Attention over blocks of a pool, in C and in torch, against a definition in float64. What must not be read is NaN."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

import pytest
import torch

from alpaca_lora.kernels import paged_attention as module
from alpaca_lora.kernels import reference
from alpaca_lora.kernels.cpu import library as library_module
from alpaca_lora.kernels.cpu.library import Library, library
from alpaca_lora.kernels.paged_attention import (
    attend_gathered,
    attend_padded,
    paged_attention,
    paged_prefill_attention,
    write_paged,
)
from tests.kernels.compare import TOLERANCE, randn

USED_BY = (module,)  # what the fixture `kernels` gives its library to
DTYPES = [torch.float32, torch.bfloat16]
# Numbers of order 1: an error of the scores, hundred roundings of float32, is the same share of the probabilities, so
# of the largest value; then one rounding to the result's dtype, of the result itself.
SCORES, ROUNDING = 1e-5, {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", lambda: Library(None, "off"))


class Pool:
    """Sequences in a pool where all else is NaN, and tables that hold nonsense behind the blocks in use."""

    def __init__(
        self, lengths: Sequence[int], heads: int, kv_heads: int, width: int, block: int, dtype: torch.dtype,
        seed: int = 0,
    ) -> None:  # fmt: skip
        draw = random.Random(seed)
        counts = [-(-length // block) for length in lengths]
        num_blocks = sum(counts) + 3
        free = draw.sample(range(num_blocks), num_blocks)
        self.keys, self.values = (torch.full((num_blocks, block, kv_heads, width), float("nan")) for _ in range(2))
        self.tables = torch.full((len(lengths), max(counts) + draw.randrange(3)), -1, dtype=torch.int32)
        self.tables[:, ::2] = 2**31 - 1
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            used = [free.pop() for _ in range(count)]
            self.tables[b, :count] = torch.tensor(used, dtype=torch.int32)
            k_SKE, v_SKE = (
                randn(length, kv_heads, width, dtype=dtype, seed=seed + 7 * b + i).float() for i in range(2)
            )
            for pool, x_SKE in ((self.keys, k_SKE), (self.values, v_SKE)):
                place_S = torch.arange(length)
                pool[self.tables[b].long()[place_S // block], place_S % block] = x_SKE
            self.past.append((k_SKE, v_SKE))
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = randn(len(lengths), heads, width, dtype=dtype, seed=seed + 5)
        self.scale = width**-0.5

    def arguments(self, window: int | None = None) -> tuple:
        return self.q, self.keys, self.values, self.tables, self.lengths, self.scale, window

    def exact(self, window: int | None = None) -> torch.Tensor:
        """The definition in float64, without blocks."""
        outs = []
        for q_HE, (k_SKE, v_SKE) in zip(self.q.double(), self.past, strict=True):
            first = 0 if window is None else max(0, len(k_SKE) - window)
            group = q_HE.shape[0] // k_SKE.shape[1]
            k, v = (x[first:].double().repeat_interleave(group, 1) for x in (k_SKE, v_SKE))
            p_HS = (torch.einsum("he,she->hs", q_HE, k) * self.scale).softmax(-1)
            outs.append(torch.einsum("hs,she->he", p_HS, v))
        return torch.stack(outs)

    def off_by(self, out_BHE: torch.Tensor, exact_BHE: torch.Tensor) -> float:
        """The largest error as a share of what is allowed."""
        largest = max(float(v_SKE.abs().max()) for _, v_SKE in self.past)
        allowed = SCORES * largest + ROUNDING[self.q.dtype] * exact_BHE.abs()
        return float(((out_BHE.double() - exact_BHE).abs() / allowed).nan_to_num(float("inf")).max())


# lengths, H, K, E, block: one place; one block and a bit; widths that fill no vector; every ratio of heads; parts
CASES = [
    ([1], 1, 1, 1, 1),
    ([1, 2, 17], 9, 3, 64, 16),
    ([5, 1, 300], 4, 4, 7, 4),
    ([255, 256, 257], 8, 2, 80, 32),
    ([1000], 71, 1, 64, 16),
    ([33, 700], 6, 1, 128, 1),
    ([64, 63], 10, 2, 100, 256),
    ([513], 12, 2, 256, 8),
    ([2, 90], 14, 2, 33, 2),
]
CASE = pytest.mark.parametrize(("lengths", "heads", "kv_heads", "width", "block"), CASES)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@CASE
@DTYPE
@pytest.mark.parametrize("window", [None, 1, 5, 256, 10_000])
def test_it_is_the_definition(
    kernels: Library, lengths: list[int], heads: int, kv_heads: int, width: int, block: int, dtype: torch.dtype,
    window: int | None,
) -> None:  # fmt: skip
    pool = Pool(lengths, heads, kv_heads, width, block, dtype)
    out_BHE = paged_attention(*pool.arguments(window))
    assert out_BHE.dtype == dtype and pool.off_by(out_BHE, pool.exact(window)) <= 1


@pytest.mark.parametrize("seed", range(40))
def test_any_shape(kernels: Library, seed: int) -> None:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3, 8])
    lengths = [draw.randint(1, draw.choice([3, 40, 600])) for _ in range(draw.choice([1, 2, 9]))]
    width, block = draw.randint(1, 256), 2 ** draw.randint(0, 6)
    pool = Pool(lengths, kv_heads * draw.randint(1, 9), kv_heads, width, block, draw.choice(DTYPES), seed)
    window = draw.choice([None, draw.randint(1, 400)])
    assert pool.off_by(paged_attention(*pool.arguments(window)), pool.exact(window)) <= 1


@DTYPE
def test_the_allowed_error_is_small(kernels: Library, dtype: torch.dtype) -> None:
    """One place too few, and scores that are wrong by two per cent, are seen."""
    pool = Pool([300], 9, 3, 64, 16, dtype)
    exact_BHE = pool.exact()
    assert pool.off_by(pool.exact(299), exact_BHE) > 1
    pool.scale *= 1.02
    assert pool.off_by(paged_attention(*pool.arguments()), exact_BHE) > 1


@CASE
@DTYPE
@pytest.mark.parametrize("window", [None, 5])
def test_the_roads_in_torch(
    plain: None, lengths: list[int], heads: int, kv_heads: int, width: int, block: int, dtype: torch.dtype,
    window: int | None,
) -> None:  # fmt: skip
    """One sequence at a time, which is used without the library; all at once, which a GPU uses; and the definition."""
    pool = Pool(lengths, heads, kv_heads, width, block, dtype)
    exact_BHE, arguments = pool.exact(window), pool.arguments(window)
    for attend in (paged_attention, attend_padded, reference.paged_attention):
        out_BHE = attend(*arguments)
        assert out_BHE.dtype == dtype
        worst = (out_BHE.double() - exact_BHE).abs().max() / exact_BHE.abs().max().clamp(min=1)
        assert worst <= TOLERANCE[dtype], attend
    assert torch.equal(paged_attention(*arguments), attend_gathered(*arguments))


@CASE
@DTYPE
def test_c_agrees_with_torch(
    kernels: Library, lengths: list[int], heads: int, kv_heads: int, width: int, block: int, dtype: torch.dtype
) -> None:
    arguments = Pool(lengths, heads, kv_heads, width, block, dtype).arguments()
    fast, slow = paged_attention(*arguments).float(), attend_gathered(*arguments).float()
    assert (fast - slow).abs().max() <= TOLERANCE[dtype] * slow.abs().max().clamp(min=1)


@DTYPE
@pytest.mark.parametrize("num_threads", [2, 3, 7])
@pytest.mark.parametrize("gnu", [True, False])
def test_threads_and_neighbours_do_not_change_a_bit(
    kernels: Library, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_threads: int, gnu: bool
) -> None:
    """Shares go to torch's own threads, or to threads of their own; a sequence alone is what it is among others."""
    pool = Pool([700, 1, 256, 1500], 6, 2, 64, 16, dtype)
    together = paged_attention(*pool.arguments())
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(library_module, "WORK_PER_THREAD", 1)
    if not gnu:
        monkeypatch.setattr(library_module, "_gnu_openmp", lambda: None)
    assert torch.equal(paged_attention(*pool.arguments()), together)
    for b in range(4):
        q, keys, values, tables, lengths, scale, window = pool.arguments()
        alone = paged_attention(q[b : b + 1], keys, values, tables[b : b + 1], lengths[b : b + 1], scale, window)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_no_more_threads_than_torch_has(kernels: Library, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    asked = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(work, argument, count, flags) -> None:
        asked.append(count)
        work(argument)

    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(library_module, "_gnu_openmp", lambda: ctypes.cast(parallel, ctypes.c_void_p))
    monkeypatch.setattr(library_module, "WORK_PER_THREAD", 1)
    pool = Pool([900, 30], 6, 2, 64, 16, torch.bfloat16)
    assert pool.off_by(paged_attention(*pool.arguments()), pool.exact()) <= 1
    assert asked == [num_threads] * (num_threads > 1)


def test_sequences_may_share_blocks(kernels: Library) -> None:
    pool = Pool([40, 48], 4, 2, 32, 16, torch.float32)
    pool.tables[1, :2] = pool.tables[0, :2]
    (k, v), (other_k, other_v) = pool.past
    pool.past[1] = (torch.cat((k[:32], other_k[32:])), torch.cat((v[:32], other_v[32:])))
    assert pool.off_by(paged_attention(*pool.arguments()), pool.exact()) <= 1


@DTYPE
def test_peaks_that_rise_and_fall(kernels: Library, dtype: torch.dtype) -> None:
    """Scores of some hundreds: what was summed up must be rescaled when a higher one comes, in any tile or part."""
    for rising in (True, False):
        pool = Pool([600], 2, 1, 16, 16, dtype)
        pool.q.fill_(3.0)
        height_S = torch.linspace(-40, 40, 600).sort(descending=not rising).values
        pool.past = [(height_S[:, None, None].expand(-1, 1, 16).to(dtype).float(), pool.past[0][1])]
        place_S = torch.arange(600)
        pool.keys[pool.tables[0].long()[place_S // 16], place_S % 16] = pool.past[0][0].to(dtype)
        out_BHE, exact_BHE = paged_attention(*pool.arguments()).double(), pool.exact()
        # the exponents are of order 500: a hundred roundings of that
        assert (out_BHE - exact_BHE).abs().max() <= 100 * 500 * 2.0**-24 + ROUNDING[dtype] * exact_BHE.abs().max()


@DTYPE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_with_its_sequence(kernels: Library, dtype: torch.dtype, value: float) -> None:
    pool = Pool([300, 300], 4, 2, 32, 16, dtype)
    healthy = paged_attention(*pool.arguments())
    pool.q[0, :2] = 1.0
    pool.keys[pool.tables[0, 0], 3, 0] = value  # in sequence 0, of query heads 0 and 1
    out_BHE = paged_attention(*pool.arguments())
    if value == float("-inf"):  # a place that nobody looks at
        assert bool(torch.isfinite(out_BHE).all())
    else:
        assert not bool(torch.isfinite(out_BHE[0, :2]).any())
    assert torch.equal(out_BHE[0, 2:], healthy[0, 2:]) and torch.equal(out_BHE[1], healthy[1])


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_a_token_that_sees_nothing_finite_has_no_number(kernels: Library, value: float) -> None:
    pool = Pool([70], 2, 1, 16, 16, torch.float32)
    pool.q.fill_(1.0)
    pool.keys.fill_(value)
    assert bool(paged_attention(*pool.arguments()).isnan().all())


def test_views_and_no_gradient(kernels: Library) -> None:
    """Query heads out of a wider product; tables and lengths as columns of something else."""
    pool = Pool([20, 5], 4, 2, 16, 16, torch.float32)
    wanted = paged_attention(*pool.arguments())
    wide_q = torch.cat((pool.q, pool.q), 1)[:, :4]
    wide_tables = torch.stack((pool.tables, pool.tables), 2)[..., 0]
    wide_lengths = torch.stack((pool.lengths, pool.lengths), 1)[:, 0]
    assert not (wide_q.is_contiguous() or wide_tables.is_contiguous() or wide_lengths.is_contiguous())
    assert torch.equal(paged_attention(wide_q, pool.keys, pool.values, wide_tables, wide_lengths, pool.scale), wanted)


@pytest.mark.parametrize("off", [True, False])
def test_what_does_not_fit_is_refused(off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if off:
        monkeypatch.setattr(module, "library", lambda: Library(None, "off"))
    elif library().handle is None:
        pytest.skip(library().reason)
    pool = Pool([20, 5], 4, 2, 16, 16, torch.float32)
    q, keys, values, tables, lengths, scale, _ = pool.arguments()
    before = paged_attention(*pool.arguments())
    wrong_tables = [tables.clone() for _ in range(2)]
    wrong_tables[0][1, 0], wrong_tables[1][0, 1] = len(keys), -1
    many = torch.tensor([20, tables.shape[1] * 16 + 1], dtype=torch.int32)
    none = torch.tensor([20, 0], dtype=torch.int32)
    refused = [
        *((q, keys, values, one, lengths, scale) for one in wrong_tables),
        *((q, keys, values, tables, one, scale) for one in (many, none, lengths[:1], lengths.long())),
        (q[:, :3], keys, values, tables, lengths, scale),
        (q[..., :8], keys, values, tables, lengths, scale),
        (q.bfloat16(), keys, values, tables, lengths, scale),
        (q, keys, values[1:], tables, lengths, scale),
        (q, keys, values.bfloat16(), tables, lengths, scale),
        (q, keys.transpose(0, 1), values.transpose(0, 1), tables, lengths, scale),
        (q, keys[:, :12].contiguous(), values[:, :12].contiguous(), tables, lengths, scale),
        (q, keys, values, tables.long(), lengths, scale),
        (q, keys, values, tables[:1], lengths, scale),
        (q, keys, values, tables, lengths, scale, 0),
    ]
    for arguments in refused:
        with pytest.raises(ValueError):
            paged_attention(*arguments)
    assert torch.equal(paged_attention(*pool.arguments()), before)


@pytest.mark.parametrize("off", [True, False])
@DTYPE
def test_writing(off: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if off:
        monkeypatch.setattr(module, "library", lambda: Library(None, "off"))
    keys, values = randn(5, 8, 3, 10, dtype=dtype), randn(5, 8, 3, 10, dtype=dtype, seed=1)
    wanted_k, wanted_v = keys.clone(), values.clone()
    wide_TKE = randn(7, 9, 10, dtype=dtype, seed=2)  # queries, keys and values side by side
    k_TKE, v_TKE = wide_TKE[:, 3:6], wide_TKE[:, 6:].transpose(1, 2).contiguous().transpose(1, 2)
    places = torch.tensor([39, 0, 8, 17, 3, 16, 31])
    for t, place in enumerate(places.tolist()):
        wanted_k[place // 8, place % 8], wanted_v[place // 8, place % 8] = k_TKE[t], v_TKE[t]
    write_paged(k_TKE, v_TKE, keys, values, places)
    assert torch.equal(keys, wanted_k) and torch.equal(values, wanted_v)
    write_paged(k_TKE[:0], v_TKE[:0], keys, values, places[:0])
    refused = [
        *((k_TKE, v_TKE, torch.cat((places[:-1], torch.tensor([one])))) for one in (40, -1)),
        (k_TKE, v_TKE, places[1:]),
        (k_TKE, v_TKE, places.int()),
        (k_TKE[:, :1], v_TKE[:, :1], places),
        (k_TKE, v_TKE[1:], places),
        (k_TKE, v_TKE.double(), places),
        (k_TKE.double(), v_TKE.double(), places),
    ]
    for arguments in refused:
        with pytest.raises(ValueError):
            write_paged(*arguments[:2], keys, values, arguments[2])
    assert torch.equal(keys, wanted_k) and torch.equal(values, wanted_v)


@pytest.mark.parametrize(("length", "start"), [(1, 0), (40, 0), (40, 39), (300, 123), (17, 16)])
@pytest.mark.parametrize("window", [None, 1, 20])
@DTYPE
def test_chunks_of_a_prompt(length: int, start: int, window: int | None, dtype: torch.dtype) -> None:
    """Each token of the chunk is what it would be as the one new token of a sequence that ends with it."""
    pool = Pool([length], 6, 2, 24, 16, dtype)
    q_THE = randn(length - start, 6, 24, dtype=dtype, seed=3)
    out_THE = paged_prefill_attention(q_THE, pool.keys, pool.values, pool.tables[0], start, pool.scale, window)
    k_SKE, v_SKE = pool.past[0]
    for t in range(length - start):
        pool.q, pool.past = q_THE[t : t + 1], [(k_SKE[: start + t + 1], v_SKE[: start + t + 1])]
        exact_BHE = pool.exact(window)
        assert (out_THE[t : t + 1].double() - exact_BHE).abs().max() <= TOLERANCE[dtype] * exact_BHE.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@DTYPE
def test_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    pool = Pool([300, 1, 17], 9, 3, 64, 16, dtype)
    exact_BHE = pool.exact(window)
    q, keys, values, tables, lengths = (x.cuda() for x in pool.arguments()[:5])
    out_BHE = paged_attention(q, keys, values, tables, lengths, pool.scale, window)
    assert (out_BHE.cpu().double() - exact_BHE).abs().max() <= TOLERANCE[dtype] * exact_BHE.abs().max().clamp(min=1)
    k_TKE, v_TKE = (randn(3, 3, 64, dtype=dtype, seed=i).cuda() for i in range(2))
    places = torch.tensor([5, 40, 16]).cuda()
    write_paged(k_TKE, v_TKE, keys, values, places)
    assert torch.equal(keys.flatten(0, 1)[places], k_TKE) and torch.equal(values.flatten(0, 1)[places], v_TKE)
