import pytest
import torch

from alpaca_lora.kernels import reference, scale
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (64, 1), (130, 33)])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_definition(shape, with_norm, with_bias, dtype):
    z, m = randn(*shape, dtype=dtype), randn(shape[1], seed=1)
    norm = randn(shape[1], seed=2).abs().add(0.5).reciprocal() if with_norm else None
    bias = randn(shape[1], dtype=dtype, seed=3) if with_bias else None
    assert_same(
        lambda z, m: scale.scale_columns(z, m, norm, bias),
        lambda z, m: reference.scale_columns(z, m, norm, bias),
        (z, m),
        dtype,
    )


def test_the_factors_gradient_is_summed_in_float32():
    """Over many rows a sum in bfloat16 stops growing: 1 + 2^-9 is 1 there."""
    rows = 20_000
    z, m = torch.ones(rows, 3, dtype=torch.bfloat16), torch.ones(3).requires_grad_()
    scale.scale_columns(z, m, None, None).backward(torch.ones_like(z))
    assert m.grad is not None and m.grad.dtype == torch.float32 and m.grad.tolist() == [rows] * 3
    assert float(sum(z[:, 0])) < rows / 2  # the negative control: the same sum, kept in bfloat16


def test_a_gradient_that_does_not_lie_in_order():
    z, m = randn(6, 4).requires_grad_(), randn(4).requires_grad_()
    upstream = randn(4, 6).t()
    scale.scale_columns(z, m, None, None).backward(upstream)
    assert m.grad is not None and torch.allclose(z.grad, m.detach() * upstream)
    assert torch.allclose(m.grad, (z.detach() * upstream).sum(0))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_asks_gets_a_gradient(needs):
    z, m = (x.requires_grad_(need) for x, need in zip((randn(5, 4), randn(4)), needs, strict=True))
    scale.scale_columns(z, m, None, None).sum().backward()
    assert ((z.grad is not None), (m.grad is not None)) == needs


def test_only_z_is_kept_and_in_its_own_dtype():
    z, m = randn(50, 20, dtype=torch.bfloat16).requires_grad_(), randn(20).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scale.scale_columns(z, m, randn(20).abs(), randn(20))
    wide = [x for x in kept if x.numel() > 20]
    assert len(wide) == 1 and wide[0].data_ptr() == z.data_ptr() and wide[0].dtype == torch.bfloat16


# ---- outputs that are scaled already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (64, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_learning_without_scaling_equals_the_definition(shape, with_bias, dtype):
    y, m = randn(*shape, dtype=dtype), randn(shape[1], seed=1)
    m[0] = 0.0  # a row that has no length has no gradient either
    bias = randn(shape[1], dtype=dtype, seed=3) if with_bias else None
    assert_same(
        lambda y, m: scale.scale_learn(y * 1, m, bias),
        lambda y, m: reference.scale_learn(y * 1, m, bias),
        (y, m),
        dtype,
    )


def test_the_gradient_of_a_factor_is_that_of_scaling_by_it():
    z, m, bias, upstream = randn(9, 5), randn(5, seed=1).add(2), randn(5, seed=2), randn(9, 5, seed=3)
    found = []
    for learn in (False, True):
        leaf = m.clone().requires_grad_()
        y = scale.scale_columns(z, m if learn else leaf, None, bias)
        y = scale.scale_learn(y.clone(), leaf, bias) if learn else y
        y.backward(upstream)
        found.append(leaf.grad)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
