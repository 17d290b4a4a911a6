"""int8 activations by token: exact whole numbers, the definition, the gradient, tokens apart from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alpaca_lora.kernels import reference
from alpaca_lora.kernels.integer import (
    ROUNDED_ELEMENTS,
    integer_linear,
    integer_product,
    plain_product,
    quantize_tokens,
)
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.int8_dynamic import Int8Dynamic
from alpaca_lora.quantization.scheme import scheme_from_json
from tests.quantization import checks

SHAPES = [(1, 1), (5, 1), (5, 7), (31, 101), (64, 192), (300, 2100)]
TOKENS = [1, 3, 65, 1100]  # 512 are a piece
SCHEME = Int8Dynamic()
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def tokens(count: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    x_TI = torch.randn(count, in_features, generator=torch.Generator().manual_seed(count + in_features)).to(dtype)
    x_TI[0] *= 100
    if count > 1:
        x_TI[1] = 0
    return x_TI


@pytest.mark.parametrize("product", [integer_product, plain_product])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (300, 1), (1, 5), (3, 5), (17, 1023), (16, 1025), (64, 9000)])
def test_products_are_exact(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, int]
) -> None:
    """Also where every product is the largest there is: nothing saturates, nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    for codes_OI in (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        torch.full(shape, -127, dtype=torch.int8),
        torch.full(shape, 127, dtype=torch.int8),
    ):
        random_TI = torch.randint(-127, 128, (7, shape[1]), generator=generator, dtype=torch.int8)
        x_TI = torch.cat((random_TI, torch.full((2, shape[1]), 127, dtype=torch.int8)))
        expected_TO = x_TI.long() @ codes_OI.long().t()
        assert torch.equal(product(x_TI, codes_OI), expected_TO.int())


@DTYPE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", TOKENS)
def test_as_the_definition(shape: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    parts = SCHEME.quantize(checks.matrix(*shape), name="w")
    x_TI, dy_TO = tokens(count, shape[1], dtype), tokens(count, shape[0], dtype)
    ours = x_TI.clone().requires_grad_()
    y_TO = SCHEME.apply(ours, parts, shape)
    y_TO.backward(dy_TO)
    expected_TO = reference.integer_linear(x_TI.float(), parts["codes"], parts["scales"], None)
    # the definition adds and takes away x W^T, for its gradient's sake, which costs it two roundings of that
    through_TO = (x_TI.float() @ checks.dense(SCHEME, parts, shape).t()).abs()
    unit = checks.BFLOAT16 if dtype == torch.bfloat16 else checks.FLOAT32
    allowed_TO = 4 * unit * expected_TO.abs() + 4 * checks.FLOAT32 * through_TO + 1e-30
    assert y_TO.dtype == dtype and bool(((y_TO.detach().float() - expected_TO).abs() <= allowed_TO).all())
    assert ours.grad is not None and ours.grad.dtype == dtype
    assert checks.off_by(ours.grad, dy_TO, checks.dense(SCHEME, parts, shape), dtype) <= 1


def test_forward_is_the_whole_number_times_its_scales() -> None:
    parts = SCHEME.quantize(checks.matrix(40, 150), name="w")
    x_TI = tokens(9, 150, torch.float32)
    scale_T1 = x_TI.abs().amax(1, keepdim=True) / 127
    codes_TI = (x_TI.double() / scale_T1.clamp_min(1e-30).double()).round().long()
    sums_TO = codes_TI @ parts["codes"].long().t()
    expected_TO = sums_TO.double() * parts["scales"].double() * scale_T1.double()
    torch.testing.assert_close(
        SCHEME.apply(x_TI, parts, (40, 150)).double(), expected_TO, rtol=4 * checks.FLOAT32, atol=0
    )


def test_error_is_that_of_eight_bits() -> None:
    parts = SCHEME.quantize(checks.matrix(64, 512), name="w")
    x_TI = torch.randn(33, 512, generator=torch.Generator().manual_seed(0))
    exact_TO = x_TI @ checks.dense(SCHEME, parts, (64, 512)).t()
    relative = float((SCHEME.apply(x_TI, parts, (64, 512)) - exact_TO).norm() / exact_TO.norm())
    # a step is about 3.3 / 127 standard deviations, its error 12^-1/2 of that
    assert 0.004 < relative < 0.012


@DTYPE
def test_tokens_do_not_see_each_other(dtype: torch.dtype) -> None:
    """A token's result is the same alone, in any company, and beside an outlier."""
    parts = SCHEME.quantize(checks.matrix(70, 130), name="w")
    x_TI = tokens(600, 130, dtype)
    together_TO = SCHEME.apply(x_TI, parts, (70, 130))
    for place in (0, 1, 2, 511, 512, 599):
        assert torch.equal(SCHEME.apply(x_TI[place : place + 1], parts, (70, 130))[0], together_TO[place])


@DTYPE
def test_quantized_tokens(dtype: torch.dtype) -> None:
    x_TI = tokens(5, 33, dtype)
    codes_TI, scale_T1 = quantize_tokens(x_TI)
    assert codes_TI.dtype == torch.int8 and scale_T1.shape == (5, 1) and scale_T1.dtype == torch.float32
    assert codes_TI.int().abs().amax(1).tolist() == [127, 0, 127, 127, 127]
    assert bool(((codes_TI * scale_T1 - x_TI.float()).abs() <= scale_T1 * 0.5001).all())


@DTYPE
def test_tokens_are_rounded_in_pieces(dtype: torch.dtype) -> None:
    """More elements than are rounded at once, and a token longer than that; the activations stay as they are."""
    for shape in ((300, 1001), (2, ROUNDED_ELEMENTS + 3)):
        x_TI = tokens(*shape, dtype)
        before_TI = x_TI.clone()
        codes_TI, scale_T1 = quantize_tokens(x_TI)
        expected_T1 = (x_TI.float().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        assert torch.equal(scale_T1, expected_T1) and torch.equal(x_TI, before_TI)
        assert torch.equal(codes_TI, (x_TI.float() * expected_T1.reciprocal()).round().to(torch.int8))


def test_no_tokens() -> None:
    x_TI = torch.zeros(0, 8, requires_grad=True)
    y_TO = SCHEME.apply(x_TI, SCHEME.quantize(checks.matrix(4, 8), name="w"), (4, 8))
    y_TO.sum().backward()
    assert y_TO.shape == (0, 4) and x_TI.grad is not None and x_TI.grad.shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    parts = SCHEME.quantize(checks.matrix(4, 8), name="w")
    x_TI = torch.ones(3, 8)
    x_TI[1, 2] = value
    y_TO = integer_linear(x_TI, parts["codes"], parts["scales"])
    assert not torch.isfinite(y_TO[1]).any() and bool(torch.isfinite(y_TO[::2]).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_is_that_of_int8(shape: tuple[int, int], tmp_path: Path) -> None:
    weight_OI = checks.matrix(*shape)
    parts = SCHEME.quantize(weight_OI, name="w")
    expected = Int8().quantize(weight_OI, name="w")
    assert parts.keys() == expected.keys() and all(torch.equal(parts[name], expected[name]) for name in parts)
    checks.assert_stored_as_promised(SCHEME, parts, shape)
    checks.assert_tiles_agree(SCHEME, parts, shape)
    checks.assert_saves(SCHEME, parts, tmp_path)


def test_what_is_not_finite_in_the_weight() -> None:
    checks.assert_refuses_what_is_not_finite(SCHEME, (3, 5))


def test_settings() -> None:
    assert SCHEME.to_json() == {"scheme": "int8_dynamic"}
    assert scheme_from_json(SCHEME.to_json()) == SCHEME
