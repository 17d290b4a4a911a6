import pytest
import torch

from alpaca_lora.kernels import reference, rotary
from tests.kernels.compare import assert_same, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 37])
def test_equals_the_definition(tokens, dtype):
    # cos and sin of unrelated halves: the definition does not promise that both halves are equal
    cos, sin = randn(tokens, 8, dtype=dtype), randn(tokens, 8, dtype=dtype, seed=1)
    assert_same(
        lambda x: rotary.rotate(x, cos, sin),
        lambda x: reference.rotate(x, cos, sin),
        (randn(tokens, 3, 8, dtype=dtype),),
        dtype,
    )
