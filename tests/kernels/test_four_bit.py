"""Four-bit weights: C and plain torch against the definition, bit for bit; the product of a few tokens."""

from __future__ import annotations

import shutil

import pytest
import torch

from alpaca_lora.kernels import four_bit, reference
from alpaca_lora.kernels.cpu import library as library_module
from alpaca_lora.kernels.cpu.library import Library
from alpaca_lora.kernels.four_bit import BlockScales
from tests.kernels.compare import TOLERANCE, outputs_and_gradients
from tests.quantization.checks import off_by

# (out, in, block): one weight, primes, blocks that straddle rows, odd rows, more than one nested block, int4's groups
USED_BY = (four_bit,)  # what the fixture `kernels` gives its library to
CASES = [
    (1, 1, 32),
    (7, 101, 64),
    (5, 26, 26),
    (3, 33, 32),
    (31, 576, 64),
    (40, 96, 128),
    (130, 4224, 32),
    (9, 102, 34),
]
CASE = pytest.mark.parametrize(("out_features", "in_features", "block_size"), CASES)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


class Weight:
    """Parts of a weight: what the ops are called with, and the same beside each element, for the definition."""

    def __init__(self, shape: tuple[int, int], block_size: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(sum(shape) + block_size)
        self.shape, self.block_size = shape, block_size
        numel = shape[0] * shape[1]
        blocks = -(-numel // block_size)
        codes_N = torch.randint(0, 16, (numel,), generator=generator, dtype=torch.uint8)
        self.packed = four_bit.pack_codes(codes_N)
        self.table = torch.randn(16, generator=generator)
        self.scales, self.zeros = BlockScales(torch.rand(blocks, generator=generator) + 0.5), None
        if kind == "nested":
            self.scales = BlockScales(
                torch.rand(-(-blocks // 256), generator=generator),
                torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8),
                torch.randn(256, generator=generator),
                torch.tensor([0.37]),
            )
        if kind == "zeros":
            self.zeros = torch.randint(0, 16, (blocks,), generator=generator).float()
        self.of_element = torch.arange(numel) // block_size
        each = [self.scales.expanded(0, blocks), *([] if self.zeros is None else [self.zeros])]
        beside = [numbers[self.of_element].view(shape) for numbers in each]
        self.wide_OI = reference.decode_four_bit(codes_N.view(shape), self.table, beside[0], (beside + [None])[1])

    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, BlockScales, torch.Tensor | None, tuple[int, int], int]:
        return self.packed, self.table, self.scales, self.zeros, self.shape, self.block_size


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_decodes(decode, weight: Weight) -> None:
    out_features, in_features = weight.shape
    rows = [slice(0, out_features), slice(out_features // 2, out_features), slice(0, 1)]
    columns = [slice(0, in_features), slice(in_features // 3, in_features), slice(0, 1), slice(32, 96)]
    for dtype in (torch.float32, torch.bfloat16):
        wanted_OI = weight.wide_OI.to(dtype)
        for some in rows:
            for others in columns:
                if others.stop > in_features:
                    continue
                tile = decode(*weight.arguments(), some, others, dtype)
                assert tile.is_contiguous() and torch.equal(bits(tile), bits(wanted_OI[some, others]))


@CASE
@pytest.mark.parametrize("kind", ["plain", "nested", "zeros"])
def test_decoding_in_c(kernels: Library, out_features: int, in_features: int, block_size: int, kind: str) -> None:
    assert_decodes(four_bit.decode_four_bit, Weight((out_features, in_features), block_size, kind))


@CASE
@pytest.mark.parametrize("kind", ["plain", "nested", "zeros"])
def test_decoding_in_torch(out_features: int, in_features: int, block_size: int, kind: str) -> None:
    assert_decodes(four_bit.decode_plain, Weight((out_features, in_features), block_size, kind))


def test_nested_scales_are_the_formula() -> None:
    weight = Weight((130, 4224), 32, "nested")
    blocks, scales = len(weight.of_element) // 32, weight.scales
    assert scales.codes is not None and scales.map is not None and scales.offset is not None
    place = torch.arange(blocks)
    wanted = scales.map[scales.codes.int()] * scales.values[place // 256] + scales.offset
    assert torch.equal(scales.expanded(0, blocks), wanted)
    for first, last in ((0, 1), (255, 257), (300, 1100), (blocks - 1, blocks)):
        assert torch.equal(scales.expanded(first, last), wanted[first:last])


@pytest.mark.parametrize("num_threads", [2, 3, 7])
@pytest.mark.parametrize("gnu", [True, False])
def test_threads_do_not_change_a_bit(
    kernels: Library, monkeypatch: pytest.MonkeyPatch, num_threads: int, gnu: bool
) -> None:
    """Shares go to torch's own threads, or to threads of their own."""
    weight = Weight((1030, 576), 64, "nested")
    x_TI = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    rows, columns = slice(1, 1030), slice(64, 576)
    alone = four_bit.decode_four_bit(*weight.arguments(), rows, columns, torch.float32)
    product = four_bit.multiply_few(x_TI, *weight.arguments())
    codes = four_bit.encode_four_bit(weight.wide_OI.view(-1), weight.table, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(library_module, "WORK_PER_THREAD", 1)
    if not gnu:
        monkeypatch.setattr(library_module, "_gnu_openmp", lambda: None)
    assert torch.equal(four_bit.decode_four_bit(*weight.arguments(), rows, columns, torch.float32), alone)
    again = four_bit.multiply_few(x_TI, *weight.arguments())
    assert (product is None) == (again is None) and (product is None or torch.equal(product, again))  # pyright: ignore
    assert all(map(torch.equal, codes, four_bit.encode_four_bit(weight.wide_OI.view(-1), weight.table, 64)))


@pytest.mark.parametrize(
    ("out_features", "in_features", "block_size"), [(1, 32, 32), (7, 96, 32), (50, 576, 64), (9, 512, 512)]
)
@pytest.mark.parametrize("kind", ["plain", "nested", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
def test_few_tokens(
    kernels: Library, out_features: int, in_features: int, block_size: int, kind: str, dtype: torch.dtype,
    num_tokens: int,
) -> None:  # fmt: skip
    weight = Weight((out_features, in_features), block_size, kind)
    x_TI = torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)
    y_TO = four_bit.multiply_few(x_TI, *weight.arguments())
    if kernels.reason == "-march=x86-64":
        assert y_TO is None
        return
    assert y_TO is not None and y_TO.dtype == dtype
    assert off_by(y_TO, x_TI, weight.wide_OI.t(), dtype) <= 1
    assert off_by(y_TO, x_TI, 1.02 * weight.wide_OI.t(), dtype) > 1


def test_what_is_no_number_stays_none(kernels: Library) -> None:
    weight = Weight((5, 64), 64, "plain")
    for value in (float("nan"), float("inf")):
        x_TI = torch.ones(2, 64).bfloat16()
        x_TI[1, 3] = value
        y_TO = four_bit.four_bit_linear(x_TI, *weight.arguments())
        assert bool(torch.isfinite(y_TO[0]).all()) and not bool(torch.isfinite(y_TO[1]).any())


def test_where_few_tokens_go_through_tiles(kernels: Library) -> None:
    """Blocks that straddle rows, many tokens, none, and another dtype."""
    straddling = Weight((6, 96), 64, "plain")
    assert four_bit.multiply_few(torch.ones(1, 96), *straddling.arguments()) is None
    fitting = Weight((6, 96), 32, "plain")
    for count in (0, 5):
        assert four_bit.multiply_few(torch.ones(count, 96), *fitting.arguments()) is None
        assert four_bit.four_bit_linear(torch.ones(count, 96), *fitting.arguments()).shape == (count, 6)
    assert four_bit.multiply_few(torch.ones(1, 96).half(), *fitting.arguments()) is None


@CASE
@pytest.mark.parametrize("num_tokens", [1, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_is_the_definition(
    kernels: Library, out_features: int, in_features: int, block_size: int, num_tokens: int, dtype: torch.dtype
) -> None:
    weight = Weight((out_features, in_features), block_size, "nested")
    x_TI = torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = outputs_and_gradients(lambda x: four_bit.four_bit_linear(x, *weight.arguments()), [x_TI])
    wanted = outputs_and_gradients(lambda x: reference.tiled_linear(x, weight.wide_OI), [x_TI])
    for g, w in zip(got, wanted, strict=True):
        assert (g.float() - w.float()).abs().max() <= TOLERANCE[dtype] * w.float().abs().max().clamp(min=1)


@pytest.mark.parametrize("numel", [1, 31, 64, 65, 577, 64 * 300 + 7])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_nearest_values(
    kernels: Library, monkeypatch: pytest.MonkeyPatch, numel: int, block_size: int, dtype: torch.dtype
) -> None:
    """In C and in torch the same bits; each code's value is the nearest of the sixteen."""
    values_N = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    values_N[: block_size // 2] *= 1e-3
    table = torch.linspace(-1, 1, 16).flip(0)  # any order
    packed, largest = four_bit.encode_four_bit(values_N, table, block_size)
    monkeypatch.setattr(four_bit, "library", lambda: Library(None, "off"))
    assert all(map(torch.equal, (packed, largest), four_bit.encode_four_bit(values_N, table, block_size)))
    scaled_N = values_N.float() / largest.repeat_interleave(block_size)[:numel]
    chosen_N = table[four_bit.unpack_codes(packed, numel).int()]
    nearest_N = (scaled_N[:, None] - table).abs().amin(1)
    torch.testing.assert_close((scaled_N - chosen_N).abs(), nearest_N, rtol=0, atol=1e-6)


@pytest.mark.parametrize("numel", [1, 2, 7, 64])
def test_packing(numel: int) -> None:
    codes = torch.randint(0, 16, (numel,), generator=torch.Generator().manual_seed(numel), dtype=torch.uint8)
    packed = four_bit.pack_codes(codes)
    assert packed.shape == (-(-numel // 2),) and int(packed[0] >> 4) == int(codes[0])
    assert torch.equal(four_bit.unpack_codes(packed, numel), codes)
