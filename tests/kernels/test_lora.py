import pytest
import torch

from alpaca_lora.kernels import lora, reference
from alpaca_lora.kernels.dropout import DropoutKey, row_keys
from tests.kernels.compare import assert_same, randn

KEY = DropoutKey(row_keys(1, 2, torch.arange(37) // 5, torch.arange(37) % 5), 0.3, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [None, KEY])
def test_equals_the_definition(dropout, dtype):
    """Two adapters of different rank and scale on one input, and a linear without one between them."""
    inputs = [
        randn(37, 24, dtype=dtype),
        randn(37, 10, dtype=dtype),
        randn(37, 11, dtype=dtype),
        randn(37, 5, dtype=dtype),
    ]
    inputs += [randn(4, 24), randn(3, 24), randn(10, 4), randn(11, 3)]

    def with_op(op):
        def run(x, y1, y2, y3, a1, a2, b1, b2):
            outputs = (y1 * 1, y3 * 1, y2 * 1)  # copies: the fast path writes into its outputs
            return op(outputs, x, (a1, None, a2), (b1, None, b2), (2.0, 1.0, 0.5), dropout)

        return run

    assert_same(with_op(lora.lora_add), with_op(reference.lora_add), inputs, dtype)


def test_no_adapter_changes_nothing():
    y = randn(3, 4)
    assert lora.lora_add((y,), randn(3, 5), (None,), (None,), (1.0,), KEY)[0] is y


def test_input_without_gradient():
    """The first layer's input needs none; A and B still get theirs."""
    a, b = randn(2, 6).requires_grad_(), randn(3, 2).requires_grad_()
    (y,) = lora.lora_add((randn(4, 3),), randn(4, 6), (a,), (b,), (1.0,))
    y.sum().backward()
    assert a.grad is not None and b.grad is not None
