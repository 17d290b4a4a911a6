import pytest
import torch

from alpaca_lora.kernels import norm, reference
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (5, 3, 16)])
@pytest.mark.parametrize("piece", [1, 100, norm.PIECE])
def test_equals_the_definition(monkeypatch, piece, shape, offset, dtype):
    monkeypatch.setattr(norm, "PIECE", piece)
    x, w = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    assert_same(
        lambda x, w: norm.rms_norm(x, w, 1e-5, offset),
        lambda x, w: reference.rms_norm(x, w, 1e-5, offset),
        (x, w),
        dtype,
    )


def test_frozen_weight_gets_no_gradient():
    x, w = randn(4, 8).requires_grad_(), randn(8)
    norm.rms_norm(x, w, 1e-5).sum().backward()
    assert x.grad is not None and w.grad is None
