"""Ops on a few rows in C against their definitions; a row alone and among others is the same, bit for bit."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.kernels import few_rows, gated, norm, reference, rotary
from alpaca_lora.models.linear import Linear, project
from tests.kernels.compare import randn

pytestmark = pytest.mark.usefixtures("kernels")
USED_BY = (few_rows,)  # what the fixture `kernels` gives its library to
DTYPES = [torch.float32, torch.bfloat16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def close(found: torch.Tensor | None, expected: torch.Tensor, steps: float) -> bool:
    """Within ``steps`` roundings of the larger of both, or of the numbers' usual size."""
    assert found is not None and found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).abs()
    return bool((error <= steps * EPS[found.dtype] * expected.double().abs().clamp(min=1)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 32])
@pytest.mark.parametrize("shapes", [(64, 64), (64, 7, 133), (37, 5), (1000, 300, 1), (3, 4), (16, 70, 3, 65, 129)])
@torch.no_grad()
def test_products(dtype: torch.dtype, num_tokens: int, shapes: tuple[int, ...]) -> None:
    in_features, *outs = shapes
    x_TI = randn(num_tokens, in_features, dtype=dtype)
    weights = [randn(out, in_features, dtype=dtype, seed=i) / in_features**0.5 for i, out in enumerate(outs)]
    found = few_rows.multiply(x_TI, weights)
    assert found is not None and len(found) == len(weights)
    for y_TO, weight in zip(found, weights, strict=True):
        expected = x_TI.double() @ weight.double().t()
        # sums of n products of order n^-1/2: their roundings in float32, then one to the dtype
        allowed = EPS[torch.float32] * in_features**0.5 * 4 + EPS[dtype] / 2 * expected.abs() * 1.01
        assert y_TO.dtype == dtype and bool(((y_TO.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x_TI, weights = randn(32, 200, dtype=dtype), [randn(50, 200, dtype=dtype, seed=1), randn(9, 200, dtype=dtype)]
    norm_I, cos_TE, sin_TE = (randn(*shape, dtype=dtype) for shape in ((200,), (32, 20), (32, 20)))

    def outputs(rows: slice) -> list[torch.Tensor]:
        x = x_TI[rows].contiguous()
        heads = x.unflatten(-1, (-1, 20))
        products = few_rows.multiply(x, weights)
        others = (
            few_rows.norm(x, norm_I, 1e-5, 0.0),
            few_rows.rotate(heads, cos_TE[rows], sin_TE[rows]),
            few_rows.gate(x, x, "silu"),
        )
        assert products is not None and all(one is not None for one in others)
        return [*products, *(one for one in others if one is not None)]

    together = outputs(slice(0, 32))
    for count in (1, 2, 3, 5, 7, 8, 11):
        for first in range(0, 32 - count, count):
            rows = slice(first, first + count)
            assert all(torch.equal(a[rows], b) for a, b in zip(together, outputs(rows), strict=True)), rows


@torch.no_grad()
def test_results_do_not_depend_on_threads() -> None:
    x_TI, weight = randn(4, 512, dtype=torch.bfloat16), randn(4000, 512, dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(few_rows.multiply(x_TI, [weight])[0])  # pyright: ignore[reportOptionalSubscript]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], one) for one in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 576), (4, 3, 20), (32, 33), (2, 1)])
@torch.no_grad()
def test_norm(dtype: torch.dtype, offset: float, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype, seed=1)
    assert close(few_rows.norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset), 2)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, offset), few_rows.norm(x, weight, 1e-5, offset))  # pyright: ignore


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rotate(dtype: torch.dtype) -> None:
    x_THE = randn(5, 3, 12, dtype=dtype)
    cos_TE, sin_TE = randn(5, 12, seed=1).cos().to(dtype), randn(5, 12, seed=1).sin().to(dtype)
    # both products may round before their sum, which may be smaller than they are
    assert close(few_rows.rotate(x_THE, cos_TE, sin_TE), reference.rotate(x_THE, cos_TE, sin_TE), 4)
    assert torch.equal(rotary.rotate(x_THE, cos_TE, sin_TE), few_rows.rotate(x_THE, cos_TE, sin_TE))  # pyright: ignore


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@torch.no_grad()
def test_gate(dtype: torch.dtype, activation: reference.Activation) -> None:
    gate_TF, up_TF = randn(3, 203, dtype=dtype) * 4, randn(3, 203, dtype=dtype, seed=1)
    gate_TF[0, :8] = torch.tensor([0.0, -0.0, 80.0, -80.0, 300.0, -300.0, 1e-30, -1e-30])
    expected = reference.gated(gate_TF, up_TF, activation)
    assert close(few_rows.gate(gate_TF, up_TF, activation), expected, 4)
    assert torch.equal(gated.gated(gate_TF, up_TF, activation), few_rows.gate(gate_TF, up_TF, activation))  # pyright: ignore


@torch.no_grad()
def test_what_is_no_number_stays_none() -> None:
    bad = torch.tensor([[float("nan"), float("inf"), 1.0, 2.0]])
    assert bool(few_rows.gate(bad, torch.ones(1, 4), "silu")[0, 0].isnan())  # pyright: ignore
    assert bool(few_rows.norm(bad, torch.ones(4), 1e-5, 0.0).isnan().any())  # pyright: ignore
    assert bool(few_rows.multiply(bad, [torch.ones(2, 4)])[0].isnan().all())  # pyright: ignore


def test_what_it_does_not_take() -> None:
    x_TI, weight = randn(2, 8), randn(3, 8)
    assert few_rows.multiply(x_TI, [weight]) is None  # gradients may be wanted
    with torch.no_grad():
        assert few_rows.multiply(randn(33, 8), [weight]) is None
        assert few_rows.multiply(x_TI[:0], [weight]) is None
        assert few_rows.multiply(x_TI[:, ::2], [randn(3, 4)]) is None
        assert few_rows.multiply(x_TI, [weight.bfloat16()]) is None
        assert few_rows.multiply(x_TI.half(), [weight.half()]) is None
        assert few_rows.multiply(x_TI, [randn(3, 9)]) is None
        assert few_rows.gate(x_TI, x_TI[:1], "silu") is None
        assert few_rows.rotate(randn(2, 3, 4), randn(1, 4), randn(1, 4)) is None
        assert few_rows.multiply(x_TI, [weight]) is not None


@torch.no_grad()
def test_linears_use_it_and_say_the_same() -> None:
    linears = []
    for i, bias in enumerate((False, False, True)):
        linears.append(Linear(40, 24, bias=bias, dtype=torch.float32))
        linears[-1].weight.copy_(randn(24, 40, seed=i))
        if bias:
            linears[-1].bias.copy_(randn(24))  # pyright: ignore
    x_TI = randn(3, 40, seed=9)
    for group in (linears[:2], linears, linears[2:]):
        for y, linear in zip(project(x_TI, group), group, strict=True):
            expected = torch.nn.functional.linear(x_TI.double(), linear.weight.double())
            expected = expected if linear.bias is None else expected + linear.bias.double()
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(linear(x_TI), y, rtol=1e-5, atol=1e-5)
