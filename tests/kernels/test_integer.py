"""Integer products against their definition, forward and backward, and on processors that torch has none for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from alpaca_lora.kernels import integer, reference
from tests.kernels.compare import assert_same, randn

ON_ANOTHER_PROCESSOR = """
import torch
from alpaca_lora.kernels.integer import integer_product
x, codes = torch.full((9, 300), 127, dtype=torch.int8), torch.full((40, 300), -127, dtype=torch.int8)
assert torch.equal(integer_product(x, codes), (x.long() @ codes.long().t()).int())
"""


def codes_and_scales(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features)
    codes_OI = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return codes_OI, torch.rand(out_features, generator=generator) / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (67, 129)])
@pytest.mark.parametrize("num_tokens", [1, 7, 530])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_equals_the_definition(
    shape: tuple[int, int], num_tokens: int, scale: float | None, dtype: torch.dtype
) -> None:
    codes_OI, scales_O = codes_and_scales(*shape)
    known = None if scale is None else torch.tensor([scale])
    assert_same(
        lambda x: integer.integer_linear(x, codes_OI, scales_O, known),
        lambda x: reference.integer_linear(x, codes_OI, scales_O, known),
        [randn(num_tokens, shape[1], dtype=dtype)],
        dtype,
    )


def test_comparison_sees_a_wrong_code() -> None:
    codes_OI, scales_O = codes_and_scales(6, 40)
    other_OI = codes_OI.clone()
    other_OI[3, 7] = -other_OI[3, 7]
    with pytest.raises(AssertionError, match="off by"):
        assert_same(
            lambda x: integer.integer_linear(x, codes_OI, scales_O * 100),
            lambda x: reference.integer_linear(x, other_OI, scales_O * 100, None),
            [randn(5, 40)],
            torch.float32,
        )


def test_a_gradient_that_is_one_number() -> None:
    """The gradient of a sum is one number seen as a matrix, without memory of its own."""
    codes_OI, scales_O = codes_and_scales(6, 40)
    x_TI = randn(5, 40).requires_grad_()
    integer.integer_linear(x_TI, codes_OI, scales_O).sum().backward()
    expected_I = (codes_OI.float() * scales_O[:, None]).sum(0)
    assert x_TI.grad is not None
    torch.testing.assert_close(x_TI.grad, expected_I.expand(5, 40))


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_processors_without_vnni_are_exact(instructions: str) -> None:
    """Their own product adds pairs in 16 bits, where the largest codes do not fit: it is found out and not used."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ON_ANOTHER_PROCESSOR], check=True, env=environment, timeout=120)
