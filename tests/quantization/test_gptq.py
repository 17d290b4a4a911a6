"""GPTQ: against the plain O(n^3) update of optimal brain quantization, on diagonal, correlated and dead inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.four_bit import FourBit
from alpaca_lora.quantization.fp4 import FP4
from alpaca_lora.quantization.gptq import DAMPING, gptq, hessian
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.scheme import Scheme
from tests.quantization.checks import assert_stored_as_promised, dense

INT4 = [Int4(64), Int4(64, symmetric=True), Int4(160), Int4(10)]  # 160 reaches over a block of 128 columns
PLAIN = [*INT4, NF4(64, double_quant=False), FP4(32, double_quant=False)]  # scales as they are found
SCHEMES = [*PLAIN, NF4(), NF4(128)]  # 128 does not divide a row: a block lies in two


def correlated_inputs(num_tokens: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs of few directions and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(2, num_inputs // 8), num_inputs, generator=generator)
    x_TI = torch.randn(num_tokens, len(directions), generator=generator) @ directions
    return x_TI + 0.3 * torch.randn(num_tokens, num_inputs, generator=generator)


def weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(7)) * 0.05


def nearest(scheme: Scheme, weight_OI: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(column (out,) as it has become, its number) -> the nearest that its elements can be stored as."""
    if isinstance(scheme, Int4):
        scale_OG, zero_OG = scheme.group_parameters(weight_OI.unflatten(1, (-1, scheme.group_size)))

        def of_int4(w_O: torch.Tensor, column: int) -> torch.Tensor:
            scale_O, zero_O = (part[:, column // scheme.group_size] for part in (scale_OG, zero_OG))
            return (scheme.round_to_codes(w_O.float(), scale_O, zero_O) - zero_O).double() * scale_O.double()

        return of_int4
    assert isinstance(scheme, FourBit)
    parts = scheme.quantize(weight_OI, name="w")
    ones = scheme.values.index(1.0)
    scale_OI = dense(scheme, {**parts, "codes": torch.full_like(parts["codes"], ones * 17)}, tuple(weight_OI.shape))
    values_K = torch.tensor(scheme.values, dtype=torch.float64)

    def of_table(w_O: torch.Tensor, column: int) -> torch.Tensor:
        each_OK = values_K * scale_OI[:, column, None].double()
        return each_OK.gather(1, (each_OK - w_O[:, None]).abs().argmin(1, keepdim=True))[:, 0]

    return of_table


def brain_quantization(weight_OI: torch.Tensor, hessian_II: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The decoded weight by the update of optimal brain quantization, in float64: the column of the largest mean square
    first; after each column the rest of W makes up for its error, and the column is eliminated from H^-1. No blocks, no
    factorisation.
    """
    stored = nearest(scheme, weight_OI)
    weight_OI = weight_OI.double().clone()
    damped_II = hessian_II.double() + DAMPING * hessian_II.diagonal().double().mean() * torch.eye(len(hessian_II))
    inverse_II = torch.linalg.inv(damped_II)
    decoded_OI = torch.empty_like(weight_OI)
    for column in sorted(range(weight_OI.shape[1]), key=lambda one: -float(hessian_II[one, one])):
        w_O = weight_OI[:, column].clone()
        decoded_OI[:, column] = stored(w_O, column)
        error_O = (w_O - decoded_OI[:, column]) / inverse_II[column, column]
        weight_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II -= torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
    return decoded_OI


def output_error(decoded_OI: torch.Tensor, weight_OI: torch.Tensor, x_TI: torch.Tensor) -> float:
    """Relative, in the norm."""
    exact_TO = x_TI.double() @ weight_OI.double().t()
    return float((x_TI.double() @ decoded_OI.double().t() - exact_TO).norm() / exact_TO.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_update_that_it_factorises(scheme: Scheme) -> None:
    x_TI, weight_OI = correlated_inputs(600, 320), weight(24, 320)
    parts = gptq(weight_OI, hessian([x_TI]), scheme, name="w")
    assert_stored_as_promised(scheme, parts, (24, 320))
    got = dense(scheme, parts, (24, 320))
    expected = brain_quantization(weight_OI, hessian([x_TI]), scheme)
    # a number on the edge between two codes may fall either way in float32; what follows makes up for it
    assert ((got - expected).abs() > 1e-6).float().mean() < 0.02
    assert output_error(got, weight_OI, x_TI) == pytest.approx(output_error(expected, weight_OI, x_TI), rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_less_error_than_rounding_where_inputs_are_correlated(scheme: Scheme) -> None:
    x_TI, weight_OI = correlated_inputs(600, 320), weight(24, 320)
    rounded = dense(scheme, scheme.quantize(weight_OI, name="w"), (24, 320))
    made = dense(scheme, gptq(weight_OI, hessian([x_TI]), scheme, name="w"), (24, 320))
    assert output_error(made, weight_OI, x_TI) < 0.7 * output_error(rounded, weight_OI, x_TI)
    # on other inputs of the same kind too, and at the price of a weight that is further away
    other_TI = correlated_inputs(2000, 320)[600:]
    assert output_error(made, weight_OI, other_TI) < 0.75 * output_error(rounded, weight_OI, other_TI)
    assert (made - weight_OI).norm() > (rounded - weight_OI).norm()


@pytest.mark.parametrize("scheme", PLAIN)
def test_equals_rounding_where_inputs_say_nothing_of_each_other(scheme: Scheme) -> None:
    weight_OI = weight(5, 320)
    diagonal_II = torch.diag(torch.rand(320, generator=torch.Generator().manual_seed(1)) + 0.1)
    made, rounded = gptq(weight_OI, diagonal_II, scheme, name="w"), scheme.quantize(weight_OI, name="w")
    assert all(torch.equal(made[part], rounded[part]) for part in rounded)


@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (1, 194)])
@pytest.mark.parametrize("scheme", [Int4(2), NF4(), FP4(32)])
def test_odd_shapes(shape: tuple[int, int], scheme: Scheme) -> None:
    parts = gptq(weight(*shape).to(torch.bfloat16), hessian([correlated_inputs(9, shape[1])]), scheme, name="w")
    assert_stored_as_promised(scheme, parts, shape)
    assert torch.isfinite(dense(scheme, parts, shape)).all()


def test_inputs_that_were_always_zero_are_rounded() -> None:
    x_TI, weight_OI, scheme = correlated_inputs(600, 64), weight(8, 64), Int4(32)
    dead_I = torch.arange(64) % 5 == 1
    x_TI[:, dead_I] = 0
    decoded = dense(scheme, gptq(weight_OI, hessian([x_TI]), scheme, name="w"), (8, 64))
    # nobody's error moved them, so each is within half a step of itself; a step is at most the range over fifteen
    assert (decoded - weight_OI)[:, dead_I].abs().max() < 0.6 * 2 * weight_OI.abs().max() * 1.3 / 15
    alive = output_error(decoded, weight_OI, x_TI)
    assert alive < output_error(dense(scheme, scheme.quantize(weight_OI, name="w"), (8, 64)), weight_OI, x_TI)
    nothing = gptq(weight_OI, torch.zeros(64, 64), scheme, name="w")
    assert all(torch.equal(nothing[part], tensor) for part, tensor in scheme.quantize(weight_OI, name="w").items())


def test_blocks_of_zeros_stay_zeros() -> None:
    """In a block without a scale every code is nothing."""
    weight_OI, scheme = weight(8, 128), NF4(double_quant=False)
    weight_OI[3, :64] = weight_OI[5] = 0
    decoded = dense(scheme, gptq(weight_OI, hessian([correlated_inputs(300, 128)]), scheme, name="w"), (8, 128))
    assert torch.isfinite(decoded).all() and not decoded[3, :64].any() and not decoded[5].any()
    assert decoded[3, 64:].any()


def test_fewer_tokens_than_inputs() -> None:
    x_TI, weight_OI, scheme = correlated_inputs(20, 128), weight(8, 128), Int4(32)
    decoded = dense(scheme, gptq(weight_OI, hessian([x_TI]), scheme, name="w"), (8, 128))
    rounded = dense(scheme, scheme.quantize(weight_OI, name="w"), (8, 128))
    assert output_error(decoded, weight_OI, x_TI) < 0.5 * output_error(rounded, weight_OI, x_TI)


def test_the_weight_and_the_hessian_are_left_alone() -> None:
    weight_OI = weight(4, 32)
    for dtype in (torch.float32, torch.float64):
        hessian_II = hessian([correlated_inputs(99, 32)]).to(dtype)
        before = weight_OI.clone(), hessian_II.clone()
        gptq(weight_OI, hessian_II, Int4(16), name="w")
        assert torch.equal(weight_OI, before[0]) and torch.equal(hessian_II, before[1])


def test_hessian_of_chunks() -> None:
    x_TI = correlated_inputs(50, 12)
    expected = 2 * x_TI.double().t() @ x_TI.double() / 50
    for chunks in ([x_TI], list(x_TI.split(7))):
        torch.testing.assert_close(hessian(chunks).double(), expected, rtol=1e-5, atol=1e-5)
    rounded = x_TI.to(torch.bfloat16)
    assert hessian([rounded]).dtype == torch.float32
    assert torch.equal(hessian([rounded]), hessian([rounded.float()]))


def test_what_is_not_finite_is_refused_by_name() -> None:
    good_II, weight_OI = hessian([correlated_inputs(99, 32)]), weight(4, 32)
    for value in (float("nan"), float("inf")):
        bad_OI, bad_II = weight_OI.clone(), good_II.clone()
        bad_OI[1, 3] = bad_II[2, 2] = value
        for one, two in ((bad_OI, good_II), (weight_OI, bad_II)):
            with pytest.raises(NumericalError, match=r"layers\.0\.q_proj: .*NaN or infinite"):
                gptq(one, two, Int4(16), name="layers.0.q_proj")
