"""AWQ: less error where some inputs are large, never more; the factors are stored and undone."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.awq import awq, mean_magnitude
from alpaca_lora.quantization.gptq import hessian
from alpaca_lora.quantization.int4 import Int4
from tests.quantization.checks import assert_stored_as_promised, dense
from tests.quantization.test_gptq import output_error, weight

SCHEMES = [Int4(32), Int4(32, symmetric=True), Int4(16, input_scales=True)]


def inputs(num_tokens: int = 200, num_inputs: int = 64, *, outliers: tuple[int, ...] = ()) -> torch.Tensor:
    x_TI = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(3))
    x_TI[:, list(outliers)] *= 30
    return x_TI


def made(x_TI: torch.Tensor, weight_OI: torch.Tensor, scheme: Int4) -> tuple[Int4, dict[str, torch.Tensor]]:
    return awq(weight_OI, hessian([x_TI]), mean_magnitude([x_TI]), scheme, name="w")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_less_error_than_rounding_with_outlier_channels(scheme: Int4) -> None:
    x_TI, weight_OI = inputs(outliers=(5, 40)), weight(24, 64)
    found, parts = made(x_TI, weight_OI, scheme)
    assert found.input_scales and (found.group_size, found.symmetric) == (scheme.group_size, scheme.symmetric)
    assert_stored_as_promised(found, parts, (24, 64))
    scaled = dense(found, parts, (24, 64))
    rounded = dense(scheme, scheme.quantize(weight_OI, name="w"), (24, 64))
    assert output_error(scaled, weight_OI, x_TI) < 0.6 * output_error(rounded, weight_OI, x_TI)
    # the linear computes with the same weight
    y_TO = found.apply(x_TI, parts, (24, 64))
    torch.testing.assert_close(y_TO, x_TI @ scaled.t(), rtol=1e-4, atol=1e-4)
    assert parts["input_scales"][5] > 1.5 * parts["input_scales"][6]


def test_never_more_error_than_rounding() -> None:
    for seed in range(5):
        x_TI = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
        weight_OI, scheme = weight(8, 64), Int4(32)
        found, parts = made(x_TI, weight_OI, scheme)
        rounded = dense(scheme, scheme.quantize(weight_OI, name="w"), (8, 64))
        # dividing by the factors rounds once more
        assert output_error(dense(found, parts, (8, 64)), weight_OI, x_TI) <= output_error(rounded, weight_OI, x_TI) * (
            1 + 1e-4
        )


def test_inputs_that_were_always_zero_and_odd_shapes() -> None:
    for shape in ((1, 2), (3, 14), (7, 64)):
        x_TI = inputs(30, shape[1])
        x_TI[:, 0] = 0
        found, parts = made(x_TI, weight(*shape).to(torch.bfloat16), Int4(2))
        assert torch.isfinite(dense(found, parts, shape)).all() and bool((parts["input_scales"] > 0).all())
    found, parts = made(torch.zeros(5, 64), weight(7, 64), Int4(32))
    rounded = dense(Int4(32), Int4(32).quantize(weight(7, 64), name="w"), (7, 64))
    torch.testing.assert_close(dense(found, parts, (7, 64)), rounded)


def test_mean_magnitude_of_chunks() -> None:
    x_TI = inputs(50, 12)
    for chunks in ([x_TI], list(x_TI.split(7))):
        torch.testing.assert_close(mean_magnitude(chunks), x_TI.abs().mean(0))


def test_what_is_not_finite_is_refused_by_name() -> None:
    x_TI, weight_OI = inputs(), weight(4, 64)
    bad_OI, bad_TI = weight_OI.clone(), x_TI.clone()
    bad_OI[1, 3] = bad_TI[2, 2] = float("nan")
    for one, two in ((x_TI, bad_OI), (bad_TI, weight_OI)):
        with pytest.raises(NumericalError, match=r"^w: .*NaN or infinite"):
            made(one, two, Int4(32))
