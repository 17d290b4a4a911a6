"""A linear made tile by tile: the product and the gradient of the decoded weight, and nothing dense that is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from alpaca_lora.kernels import reference, tiled
from alpaca_lora.kernels.tiled import constant_columns, scaled_linear, spans, tiled_linear
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.nf4 import NF4
from tests.kernels.compare import assert_same, randn

# (tokens, out, in): one of each, primes, more than one tile in both directions, none
SHAPES = [(1, 1, 1), (7, 13, 31), (5, 257, 300), (33, 600, 530), (2, 1030, 64)]
SHAPE = pytest.mark.parametrize(("num_tokens", "out_features", "in_features"), SHAPES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 256 * 300)


class Decoder:
    """A scheme's tiles of one weight; notes how large they were."""

    def __init__(self, scheme: Int8 | NF4, weight_OI: torch.Tensor, dtype: torch.dtype) -> None:
        self.scheme, self.dtype, self.sizes = scheme, dtype, list[int]()
        self.parts = scheme.quantize(weight_OI, name="w")
        self.shape = weight_OI.shape[0], weight_OI.shape[1]

    def __call__(self, rows: slice, columns: slice) -> torch.Tensor:
        tile = self.scheme.tile(self.parts, self.shape, rows, columns, self.dtype)
        self.sizes.append(tile.numel())
        return tile

    def dense(self) -> torch.Tensor:
        whole = slice(0, self.shape[0]), slice(0, self.shape[1])
        return self.scheme.tile(self.parts, self.shape, *whole, torch.float32)


@SHAPE
@DTYPE
@pytest.mark.parametrize("scheme", [Int8(), NF4()], ids=str)
def test_product_and_gradient_are_those_of_the_decoded_weight(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, scheme: Int8 | NF4
) -> None:
    decoder = Decoder(scheme, randn(out_features, in_features), dtype)
    assert_same(
        lambda x: tiled_linear(x, decoder, out_features),
        lambda x: reference.tiled_linear(x, decoder.dense()),
        [randn(num_tokens, in_features, dtype=dtype)],
        dtype,
    )
    other = decoder.dense() * 1.05
    with pytest.raises(AssertionError, match="off by"):
        assert_same(
            lambda x: tiled_linear(x, decoder, out_features),
            lambda x: reference.tiled_linear(x, other),
            [randn(num_tokens, in_features, dtype=dtype) * 10],
            dtype,
        )


def test_tiles_change_nothing() -> None:
    """Each output and each gradient is one sum, whatever the tiles are: as near to the exact one as without tiles."""
    decoder = Decoder(Int8(), randn(600, 530), torch.float32)
    x_TI = randn(9, 530).requires_grad_()
    y_TO = tiled_linear(x_TI, decoder, 600)
    torch.testing.assert_close(y_TO.double(), x_TI.double() @ decoder.dense().double().t(), rtol=1e-5, atol=1e-4)
    assert len(decoder.sizes) == 3
    y_TO.sum().backward()
    assert x_TI.grad is not None
    torch.testing.assert_close(x_TI.grad, decoder.dense().sum(0).expand(9, -1), rtol=1e-5, atol=1e-4)


@DTYPE
def test_nothing_dense_is_made_or_kept(dtype: torch.dtype) -> None:
    out_features, in_features = 1100, 900
    decoder = Decoder(Int8(), randn(out_features, in_features), dtype)
    x_TI = randn(3, in_features, dtype=dtype).requires_grad_()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y_TO = tiled_linear(x_TI, decoder, out_features)
    y_TO.sum().backward()
    assert packed == []
    assert max(decoder.sizes) <= 256 * max(out_features, in_features) < out_features * in_features / 3
    assert not any(isinstance(value, torch.Tensor) for value in vars(y_TO.grad_fn).values())


@pytest.mark.parametrize("scheme", [Int8(), NF4()], ids=str)
def test_neither_tiles_nor_inputs_outlive_the_forward_pass(scheme: Int8 | NF4) -> None:
    weight_OI = randn(520, 320)
    parts = scheme.quantize(weight_OI, name="w")
    x_TI = randn(12, 320).requires_grad_()
    inner_TI = x_TI * 1  # nobody else's: only the graph may keep it
    y_TO = scheme.apply(inner_TI, parts, (520, 320))
    seen = weakref.ref(inner_TI)
    del inner_TI
    gc.collect()
    assert seen() is None
    y_TO.sum().backward()
    assert x_TI.grad is not None


def test_outputs_without_tiles_are_taken_where_they_are_given() -> None:
    decoder = Decoder(Int8(), randn(40, 20), torch.float32)
    x_TI = randn(2, 20).requires_grad_()
    given_TO = randn(2, 40, seed=9)
    y_TO = tiled_linear(x_TI, decoder, 40, lambda x: given_TO.clone())
    assert torch.equal(y_TO, given_TO) and decoder.sizes == []
    y_TO.sum().backward()  # the gradient goes through tiles as ever
    assert x_TI.grad is not None
    torch.testing.assert_close(x_TI.grad, decoder.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
    passed_TO = tiled_linear(x_TI, decoder, 40, lambda x: None)
    torch.testing.assert_close(passed_TO, x_TI @ decoder.dense().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("other", [1, 64, 300, 100_000])
def test_spans_cover_the_axis(length: int, other: int) -> None:
    found = list(spans(length, other))
    assert [place for span in found for place in range(span.start, span.stop)] == list(range(length))
    assert all(span.start % tiled.ALIGNMENT == 0 for span in found)
    assert all(span.stop - span.start <= max(256, 256 * 300 // other) for span in found)


def test_no_tokens() -> None:
    decoder = Decoder(Int8(), randn(5, 4), torch.float32)
    x_TI = torch.empty(0, 4, requires_grad=True)
    y_TO = tiled_linear(x_TI, decoder, 5)
    y_TO.sum().backward()
    assert y_TO.shape == (0, 5) and x_TI.grad is not None and x_TI.grad.shape == (0, 4)


@SHAPE
@DTYPE
def test_scaled_rows(num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    decoder = Decoder(Int8(), randn(out_features, in_features), dtype)
    codes_OI, scales_O = decoder.parts["codes"], decoder.parts["scales"]
    assert_same(
        lambda x: scaled_linear(x, codes_OI, scales_O),
        lambda x: reference.tiled_linear(x, decoder.dense()),
        [randn(num_tokens, in_features, dtype=dtype)],
        dtype,
    )


@DTYPE
def test_constant_columns(dtype: torch.dtype) -> None:
    scales_I = randn(37).abs() + 0.1
    assert_same(
        lambda x: constant_columns(x, scales_I),
        lambda x: reference.scale_columns(x, scales_I, None, None),
        [randn(11, 37, dtype=dtype)],
        dtype,
    )
