"""bitsandbytes' four-bit functions on a CPU, and weights to compare on: what the tests of NF4 and FP4 share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alpaca_lora.quantization.dynamic_map import dynamic_map
from alpaca_lora.quantization.four_bit import FourBit
from alpaca_lora.quantization.scheme import Parts

# one weight, odd numbers of them, blocks that straddle rows, whole blocks, more than one block of scales
SHAPES = [(1, 1), (1, 64), (3, 5), (7, 101), (33, 100), (64, 64), (31, 576), (257, 300), (1100, 576)]
BLOCKS = [32, 64, 256, 4096]


def functional() -> Any:
    """``bitsandbytes.functional``; its compiled fallback, for rows of odd length, is run as it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("bitsandbytes.functional")
    torch.compiler.set_stance("force_eager")
    return module


def weights(shape: tuple[int, int]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(shape))
    normal_OI = torch.randn(shape, generator=generator) * 0.05
    yield "normal", normal_OI
    yield "uniform", torch.rand(shape, generator=generator) - 0.5
    yield "ties", torch.randint(-8, 9, shape, generator=generator) / 8
    yield "equal", torch.full(shape, 0.3)
    yield "zeros", torch.zeros(shape)
    some = normal_OI.clone()
    some.view(-1)[:128] = 0
    yield "zeros in front", some
    some = normal_OI.clone()
    some.view(-1)[some.numel() // 2] = 1e4
    yield "outlier", some
    yield "denormal", normal_OI * 1e-38
    yield "more denormal", normal_OI * 1e-39
    yield "huge", normal_OI * 1e33


def assert_equal(scheme: FourBit, weight_OI: torch.Tensor, theirs: Any, what: str) -> None:
    """Codes, all constants and what they decode to, bit by bit."""
    codes, state = theirs.quantize_4bit(
        weight_OI.clone(), quant_type=scheme.name, blocksize=scheme.block_size, compress_statistics=scheme.double_quant
    )
    parts = scheme.quantize(weight_OI, name="w")
    expected = {"codes": codes.view(-1), "absmax": state.absmax}
    if scheme.double_quant:
        assert torch.equal(state.state2.code, dynamic_map())
        expected = {
            "codes": codes.view(-1), "absmax_codes": state.absmax, "absmax_scales": state.state2.absmax,
            "absmax_offset": state.offset.view(1),
        }  # fmt: skip
    assert set(parts) == set(expected)
    for part, wanted in expected.items():
        assert parts[part].dtype == wanted.dtype
        assert torch.equal(parts[part].view(torch.uint8), wanted.contiguous().view(torch.uint8)), f"{what}: {part}"
    _assert_decoded(scheme, parts, weight_OI, (codes, state), theirs, what)


def _assert_decoded(
    scheme: FourBit, parts: Parts, weight_OI: torch.Tensor, stored: tuple[Any, Any], theirs: Any, what: str
) -> None:
    shape = weight_OI.shape[0], weight_OI.shape[1]
    codes, state = stored
    if shape[1] % scheme.block_size:
        # its vector code takes the wrong scales where blocks straddle rows: let it see one long row
        state.shape = torch.Size((weight_OI.numel(),))
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and "denormal" in what:
            continue  # its bfloat16 instruction makes zeros of them; torch and we do not
        state.dtype = dtype
        wanted_OI = theirs.dequantize_4bit(codes, state).view(shape)
        decoded_OI = scheme.tile(parts, shape, slice(0, shape[0]), slice(0, shape[1]), dtype)
        assert decoded_OI.dtype == dtype
        # + 0: FP4's second zero has another sign in some of its paths
        assert torch.equal((decoded_OI + 0).view(torch.uint8), (wanted_OI + 0).view(torch.uint8)), f"{what}: {dtype}"
