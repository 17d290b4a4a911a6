import pytest
import torch

from alpaca_lora.kernels import cross_entropy, reference
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_equals_the_definition(monkeypatch, rows, softcap, dtype):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)
    target = torch.arange(rows) % 50
    assert_same(
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, target, 41, softcap),
        lambda h, w: reference.linear_cross_entropy(h, w, target, 41, softcap),
        (randn(rows, 24, dtype=dtype), randn(50, 24, dtype=dtype)),
        dtype,
    )


def test_without_gradient_and_without_rows():
    h, w = randn(5, 8), randn(11, 8)
    target = torch.arange(5)
    with torch.no_grad():
        plain = reference.linear_cross_entropy(h, w, target, 5)
        assert torch.allclose(cross_entropy.linear_cross_entropy(h, w, target, 5), plain)
        assert cross_entropy.linear_cross_entropy(h[:0], w, target[:0], 0).item() == 0.0


def test_extreme_logits_stay_finite():
    h = torch.tensor([[300.0, 0.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    loss = cross_entropy.linear_cross_entropy(h, w, torch.tensor([1]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(600.0) and torch.isfinite(h.grad).all()


def test_not_finite_input_is_seen():
    h = torch.tensor([[float("nan"), 0.0]], requires_grad=True)
    assert not torch.isfinite(cross_entropy.linear_cross_entropy(h, randn(3, 2), torch.tensor([1]), 1))
