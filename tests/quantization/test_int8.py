"""int8 by output: codes against bitsandbytes and torchao, the product, files, bad input."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import ConfigError
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.scheme import scheme_from_json
from tests.quantization import checks

SHAPES = [(1, 1), (5, 7), (31, 101), (64, 192), (300, 130)]
SCHEME = Int8()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = checks.matrix(*shape, dtype=dtype)
    parts = SCHEME.quantize(weight_OI, name="w")
    checks.assert_stored_as_promised(SCHEME, parts, shape)
    step_O = weight_OI.float().abs().amax(1, keepdim=True) / 127
    error_OI = (checks.dense(SCHEME, parts, shape) - weight_OI.float()).abs()
    assert bool((error_OI <= step_O / 2 * (1 + 256 * checks.FLOAT32)).all())
    assert int(parts["codes"].abs().max()) == 127


def test_a_row_of_zeros_stays_zero() -> None:
    parts = SCHEME.quantize(torch.zeros(3, 8), name="w")
    assert not checks.dense(SCHEME, parts, (3, 8)).any()


@pytest.mark.parametrize("value", [1e-35, 3e38])
def test_the_ends_of_float32(value: float) -> None:
    weight_OI = torch.tensor([[value, -value / 2, 0.0]])
    parts = SCHEME.quantize(weight_OI, name="w")
    torch.testing.assert_close(checks.dense(SCHEME, parts, (1, 3)), weight_OI, rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(shape: tuple[int, int]) -> None:
    checks.assert_tiles_agree(SCHEME, SCHEME.quantize(checks.matrix(*shape), name="w"), shape)


# up to 8 tokens of bfloat16 go through torch's own product where both sides are multiples of 64
@pytest.mark.parametrize("shape", [*SHAPES, (128, 64), (64, 100), (100, 64), (600, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 8, 11])
def test_product_and_gradient(shape: tuple[int, int], dtype: torch.dtype, num_tokens: int) -> None:
    parts = SCHEME.quantize(checks.matrix(*shape), name="w")
    checks.assert_linear(SCHEME, parts, shape, dtype, num_tokens)


def test_rows_that_are_not_contiguous() -> None:
    parts = SCHEME.quantize(checks.matrix(64, 64), name="w")
    x_TI = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).bfloat16().t()
    assert torch.equal(SCHEME.apply(x_TI, parts, (64, 64)), SCHEME.apply(x_TI.contiguous(), parts, (64, 64)))


def test_codes_are_those_of_bitsandbytes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
        weight_OI = checks.matrix(67, 129, dtype=torch.float16)
        weight_OI[2] = 1e-3  # theirs divides by zero in a row of zeros
        codes_OI, largest_O, _ = functional.int8_vectorwise_quant(weight_OI.clone())
    parts = SCHEME.quantize(weight_OI, name="w")
    torch.testing.assert_close(parts["scales"] * 127, largest_O, rtol=4 * checks.FLOAT32, atol=0)
    wrong = parts["codes"].int() - codes_OI.int()
    # theirs multiplies by 127 / largest: another rounding, which matters only right between two codes
    assert int(wrong.abs().max()) <= 1 and int(wrong.count_nonzero()) <= 0.001 * wrong.numel()


def test_not_worse_than_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        linear = torch.nn.Linear(256, 96, bias=False)
        weight_OI = linear.weight.detach().clone()
        peer = torch.nn.Sequential(linear)
        torchao.quantize_(peer, torchao.Int8WeightOnlyConfig())
        theirs_OI = peer[0].weight.dequantize()  # pyright: ignore
    ours_OI = checks.dense(SCHEME, SCHEME.quantize(weight_OI, name="w"), (96, 256))
    assert (ours_OI - weight_OI).norm() <= 1.01 * (theirs_OI - weight_OI).norm()


def test_file(tmp_path: Path) -> None:
    checks.assert_saves(SCHEME, SCHEME.quantize(checks.matrix(9, 33), name="w"), tmp_path)


def test_what_is_not_finite() -> None:
    checks.assert_refuses_what_is_not_finite(SCHEME, (530, 8200))  # more than one piece of rows
    checks.assert_refuses_what_is_not_finite(SCHEME, (3, 5))


def test_linear_with_bias_and_batch() -> None:
    dense = torch.nn.Linear(24, 10)
    packed = QuantizedLinear.from_dense(dense, SCHEME, name="w")
    x = torch.randn(2, 3, 24)
    expected = x @ packed.dense_weight().t() + dense.bias
    torch.testing.assert_close(packed(x), expected)


def test_settings() -> None:
    assert scheme_from_json(SCHEME.to_json()) == SCHEME
    with pytest.raises(ConfigError, match="group_size: unknown setting of int8"):
        Int8.make({"group_size": 3})
