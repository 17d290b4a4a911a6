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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [None, KEY])
def test_a_constant_pair_beside_the_trained_one(dropout, dtype):
    """On the first of two adapters; it acts forward and in the input's gradient, and gets none itself."""
    inputs = [randn(37, 24, dtype=dtype), randn(37, 10, dtype=dtype), randn(37, 11, dtype=dtype)]
    inputs += [randn(4, 24), randn(3, 24), randn(10, 4), randn(11, 3)]
    pair = randn(2, 24, seed=5).requires_grad_(), randn(10, 2, seed=6).requires_grad_()

    def with_op(op, constants):
        return lambda x, y1, y2, a1, a2, b1, b2: op(
            (y1 * 1, y2 * 1), x, (a1, a2), (b1, b2), (2.0, 0.5), dropout, constants
        )

    assert_same(with_op(lora.lora_add, (pair, None)), with_op(reference.lora_add, (pair, None)), inputs, dtype)
    assert pair[0].grad is None and pair[1].grad is None
    with pytest.raises(AssertionError, match="off by"):
        assert_same(with_op(lora.lora_add, (pair, None)), with_op(reference.lora_add, (None, None)), inputs, dtype)


def test_pairs_that_cancel_leave_the_output_as_it_was():
    """In bfloat16 too, where adding and taking away one after the other would round the output twice."""
    x, y = randn(37, 24, dtype=torch.bfloat16), randn(37, 10, dtype=torch.bfloat16)
    a, b = randn(4, 24), randn(10, 4)
    (same,) = lora.lora_add((y.clone(),), x, (a,), (b,), (2.0,), None, ((a, -b),))
    assert torch.equal(same, y)
    (one,) = lora.lora_add((y.clone(),), x, (a,), (b,), (2.0,))
    (two,) = lora.lora_add((one,), x, (a,), (-b,), (2.0,))
    assert not torch.equal(two, y)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_frozen_factors_get_no_gradient_and_the_others_the_same(frozen):
    """A factor that asks for none costs no product."""
    x, y, a, b = randn(7, 6), randn(7, 5), randn(2, 6), randn(5, 2)

    def run(factors):
        leaf = x.clone().requires_grad_()
        (out,) = lora.lora_add((y.clone(),), leaf, (factors[0],), (factors[1],), (1.5,), None, None)
        out.square().sum().backward()
        return leaf.grad, *(f.grad for f in factors)

    wanted = run([a.clone().requires_grad_(), b.clone().requires_grad_()])
    got = run([f.clone().requires_grad_(i not in frozen) for i, f in enumerate((a, b))])
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g is None if i - 1 in frozen else torch.equal(g, w)


# ---- outputs that hold the update already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_without_adding_equals_the_definition(dtype):
    inputs = [randn(37, 24, dtype=dtype), *(randn(37, n, dtype=dtype) for n in (10, 11, 5))]
    inputs += [randn(4, 24), randn(3, 24), randn(10, 4), randn(11, 3)]

    def with_op(op):
        # x takes part elsewhere too, so that it has a gradient to compare
        return lambda x, y1, y2, y3, a1, a2, b1, b2: op(
            (y1 + x[:, :10], y3 * 1, y2 * 1), x, (a1, None, a2), (b1, None, b2), (2.0, 1.0, 0.5)
        )

    assert_same(with_op(lora.lora_learn), with_op(reference.lora_learn), inputs, dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(with_op(lora.lora_learn), with_op(reference.lora_add), inputs, dtype)


def test_learning_leaves_the_outputs_as_they_are():
    y, x = randn(7, 5), randn(7, 6).requires_grad_()
    a, b = randn(2, 6).requires_grad_(), randn(5, 2).requires_grad_()
    (same,) = lora.lora_learn((y,), x, (a,), (b,), (1.5,))
    assert same.data_ptr() == y.data_ptr() and torch.equal(same, randn(7, 5))
    same.sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None
    assert lora.lora_learn((y,), x, (None,), (None,), (1.0,))[0] is y


def test_gradients_of_learning_are_those_of_adding():
    x, dy = randn(9, 6), randn(9, 5)
    found = []
    for op in (lora.lora_add, lora.lora_learn):
        a, b = randn(2, 6).requires_grad_(), randn(5, 2).requires_grad_()
        op((randn(9, 5),), x, (a,), (b,), (1.5,))[0].backward(dy)
        found.append((a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
