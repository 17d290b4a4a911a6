import pytest
import torch

from alpaca_lora.kernels import reference, straight_through
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 24, 11), (64, 5, 33)])
def test_equals_the_definition(shape, dtype):
    tokens, inputs, outputs = shape
    tensors = (
        randn(tokens, outputs, dtype=dtype),
        randn(tokens, inputs, dtype=dtype),
        randn(outputs, inputs, dtype=dtype),
    )

    def with_op(op):
        # x takes part elsewhere too, so that it has a gradient to compare
        return lambda y, x, w: op(y * 1 + x[:, :1], x, w)

    fast, plain = with_op(straight_through.weight_learn), with_op(reference.weight_learn)
    assert_same(fast, plain, tensors, dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(with_op(lambda y, x, w: y + x @ w.t()), plain, tensors, dtype)


def test_the_output_is_the_one_given():
    y, x, w = randn(4, 3), randn(4, 5).requires_grad_(), randn(3, 5).requires_grad_()
    same = straight_through.weight_learn(y, x, w)
    same.sum().backward()
    assert same.data_ptr() == y.data_ptr() and torch.equal(same, randn(4, 3))
    assert x.grad is None and w.grad is not None
    assert torch.allclose(w.grad, x.detach().sum(0).expand(3, 5), atol=1e-6)


def test_a_frozen_weight_costs_nothing():
    y, x, w = randn(4, 3).requires_grad_(), randn(4, 5), randn(3, 5)
    straight_through.weight_learn(y * 1, x, w).sum().backward()
    assert w.grad is None and torch.equal(y.grad, torch.ones(4, 3))
