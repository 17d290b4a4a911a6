import pytest
import torch

from alpaca_lora.kernels import gated, reference
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("piece", [1, 100, gated.PIECE])
def test_equals_the_definition(monkeypatch, piece, activation, dtype):
    monkeypatch.setattr(gated, "PIECE", piece)
    inputs = randn(37, 24, dtype=dtype), randn(37, 24, dtype=dtype, seed=1)
    assert_same(
        lambda g, u: gated.gated(g, u, activation), lambda g, u: reference.gated(g, u, activation), inputs, dtype
    )
