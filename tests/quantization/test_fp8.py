"""float8 by output: both formats against torch's and torchao's conversions, the product, files, bad input."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.kernels.float8 import widen
from alpaca_lora.quantization.fp8 import FORMATS, FP8
from alpaca_lora.quantization.scheme import scheme_from_json
from tests.quantization import checks

SHAPES = [(1, 1), (5, 7), (31, 101), (64, 192), (300, 130)]
# half a step at the largest fraction, relative to the number; a step of the subnormal numbers, relative to the scale
ROUNDING = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17)}
FORMAT = pytest.mark.parametrize("format", sorted(FORMATS))


@FORMAT
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme, weight_OI = FP8(format), checks.matrix(*shape, dtype=dtype)
    parts = scheme.quantize(weight_OI, name="w")
    checks.assert_stored_as_promised(scheme, parts, shape)
    relative, subnormal = ROUNDING[format]
    decoded_OI = checks.dense(scheme, parts, shape)
    allowed_OI = (weight_OI.float().abs() * relative).maximum(parts["scales"][:, None] * subnormal) * 1.0001
    assert bool(((decoded_OI - weight_OI.float()).abs() <= allowed_OI).all())
    largest = torch.finfo(FORMATS[format]).max
    assert float(parts["codes"].float().abs().max()) == largest


@FORMAT
@pytest.mark.parametrize("value", [1e-38, 3.4e38, 1.0])
def test_never_nan_or_infinite(format: str, value: float) -> None:
    scheme = FP8(format)
    parts = scheme.quantize(torch.tensor([[value, -value, value * 0.999, 0.0], [0.0] * 4]), name="w")
    assert bool(torch.isfinite(checks.dense(scheme, parts, (2, 4))).all())
    scheme.check_parts(parts, name="w", file="f")
    assert not checks.dense(scheme, parts, (2, 4))[1].any()


def pairs_of(codes: torch.Tensor) -> torch.Tensor:
    """(65536, 2): each code beside each."""
    numbers = codes.view(torch.uint8)
    return torch.cartesian_prod(numbers, numbers).view(codes.dtype)


@FORMAT
def test_every_code_is_read_as_torch_reads_it(format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[format])
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(widen(codes, dtype), codes.to(dtype), rtol=0, atol=0, equal_nan=True)
    # read two by two: an odd number of them, an odd place to start from, every pair of codes
    for some in (codes.view(16, 16)[:, 3:9], codes[3:10], codes[3:11], codes[:0], pairs_of(codes)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.testing.assert_close(widen(some, dtype), some.to(dtype), rtol=0, atol=0, equal_nan=True)


@FORMAT
def test_codes_are_those_of_torchao(format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        primitives = pytest.importorskip("torchao.quantization.quant_primitives")
        weight_OI = checks.matrix(40, 70)
        weight_OI[2] = 0.01
        scale = primitives._choose_scale_float8(weight_OI, [1, 70], FORMATS[format])
        codes = primitives._quantize_affine_float8(weight_OI, scale, FORMATS[format])
    parts = FP8(format).quantize(weight_OI, name="w")
    torch.testing.assert_close(parts["scales"], scale.view(-1), rtol=2 * checks.FLOAT32, atol=0)
    same = parts["codes"].view(torch.uint8) == codes.view(torch.uint8)
    assert float(same.float().mean()) >= 0.999  # scales may differ in their last bit


@FORMAT
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(format: str, shape: tuple[int, int]) -> None:
    scheme = FP8(format)
    checks.assert_tiles_agree(scheme, scheme.quantize(checks.matrix(*shape), name="w"), shape)


@FORMAT
@pytest.mark.parametrize("shape", [*SHAPES, (600, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme = FP8(format)
    checks.assert_linear(scheme, scheme.quantize(checks.matrix(*shape), name="w"), shape, dtype)


@FORMAT
def test_file(format: str, tmp_path: Path) -> None:
    scheme = FP8(format)
    checks.assert_saves(scheme, scheme.quantize(checks.matrix(9, 33), name="w"), tmp_path)


@pytest.mark.parametrize(("format", "code"), [("e4m3", 0x7F), ("e4m3", 0xFF), ("e5m2", 0x7C), ("e5m2", 0xFE)])
def test_codes_that_are_no_numbers(format: str, code: int) -> None:
    scheme = FP8(format)
    parts = scheme.quantize(checks.matrix(4, 6), name="w")
    parts["codes"].view(torch.uint8)[1, 2] = code
    with pytest.raises(NumericalError, match=r"f\.safetensors: v_proj\.codes: NaN or infinite"):
        scheme.check_parts(parts, name="v_proj", file="f.safetensors")


@FORMAT
def test_what_is_not_finite(format: str) -> None:
    checks.assert_refuses_what_is_not_finite(FP8(format), (3, 5))


def test_settings() -> None:
    assert scheme_from_json({"scheme": "fp8"}) == FP8("e4m3")
    assert scheme_from_json(FP8("e5m2").to_json()) == FP8("e5m2")
    with pytest.raises(ConfigError, match="format: is 'e3m4', expected e4m3 or e5m2"):
        FP8.make({"format": "e3m4"})
