"""int4 in groups: codes against torchao, the parts that GPTQ and AWQ make, the product, files, bad input."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.four_bit import unpack_codes
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.scheme import Scheme, scheme_from_json
from tests.quantization import checks

# (out, in, group): one group, one row, primes, sizes that are no multiple of anything
CASES = [(1, 2, 2), (1, 128, 128), (5, 26, 26), (7, 102, 34), (31, 576, 64), (130, 96, 32), (16, 48, 6)]
CASE = pytest.mark.parametrize(("out_features", "in_features", "group_size"), CASES)
KIND = pytest.mark.parametrize("symmetric", [False, True])
HALF = 2.0**-11  # half a unit of float16, relative


@KIND
@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(out_features: int, in_features: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    scheme, shape = Int4(group_size, symmetric), (out_features, in_features)
    weight_OI = checks.matrix(*shape, dtype=dtype)
    parts = scheme.quantize(weight_OI, name="w")
    checks.assert_stored_as_promised(scheme, parts, shape)
    groups = weight_OI.float().unflatten(1, (-1, group_size))
    error = (checks.dense(scheme, parts, shape).unflatten(1, (-1, group_size)) - groups).abs().amax(-1)
    step = parts["scales"].float().abs()
    # half a step, or a whole one where a symmetric range ends; scale and zero point are rounded, 15 steps off at most
    allowed = step * ((1 if symmetric else 0.5) + 15 * HALF + (0 if symmetric else 0.5))
    assert bool((error <= allowed + 2**-24).all())
    if symmetric:
        largest = groups.abs().amax(-1)
        assert bool((error <= largest / 8 * (1 + 16 * HALF) + 2**-24).all())


def test_zero_is_a_number_that_is_kept() -> None:
    for scheme in (Int4(4), Int4(4, symmetric=True)):
        weight_OI = torch.tensor([[0.3, 0.0, 0.7, 0.0], [-0.3, 0.0, -0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
        decoded_OI = checks.dense(scheme, scheme.quantize(weight_OI, name="w"), (3, 4))
        assert not decoded_OI[weight_OI == 0].any()


def test_symmetric_uses_all_codes() -> None:
    """The largest magnitude is kept to the rounding of the scale, whatever its sign; the error on normal weights is
    less than with the largest over 7.
    """
    scheme = Int4(8, symmetric=True)
    weight_OI = torch.tensor([[0.8, -0.7, 0.1, 0, 0, 0, 0, 0], [-0.8, 0.7, 0.1, 0, 0, 0, 0, 0]])
    decoded_OI = checks.dense(scheme, scheme.quantize(weight_OI, name="w"), (2, 8))
    torch.testing.assert_close(decoded_OI, weight_OI, rtol=2 * HALF, atol=1e-6)

    normal_OI = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    parts = Int4(128, symmetric=True).quantize(normal_OI, name="w")
    ours = (checks.dense(Int4(128, symmetric=True), parts, (64, 512)) - normal_OI).square().mean()
    step = normal_OI.unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True) / 7
    plain_OI = ((normal_OI.unflatten(1, (-1, 128)) / step).round() * step).flatten(1)
    assert ours < 0.85 * (plain_OI - normal_OI).square().mean()


@pytest.mark.parametrize("value", [1e-9, 1e-6, 1e5])
def test_scales_beyond_float16_are_finite(value: float) -> None:
    for scheme in (Int4(4), Int4(4, symmetric=True)):
        parts = scheme.quantize(torch.tensor([[value, -value, 0.0, value / 2]]), name="w")
        scheme.check_parts(parts, name="w", file="f")
        decoded_OI = checks.dense(scheme, parts, (1, 4))
        assert float(decoded_OI.abs().max()) <= 1.2 * value + 2**-23


@KIND
@CASE
def test_tiles(out_features: int, in_features: int, group_size: int, symmetric: bool) -> None:
    shape = (out_features, in_features)
    for scheme in (Int4(group_size, symmetric), Int4(group_size, symmetric, input_scales=True)):
        parts = scheme.quantize(checks.matrix(*shape), name="w")
        if scheme.input_scales:
            parts["input_scales"].copy_(torch.linspace(0.3, 3, in_features))
        checks.assert_tiles_agree(scheme, parts, shape)


@KIND
@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient(
    out_features: int, in_features: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    shape = (out_features, in_features)
    for scheme in (Int4(group_size, symmetric), Int4(group_size, symmetric, input_scales=True)):
        parts = scheme.quantize(checks.matrix(*shape), name="w")
        if scheme.input_scales:
            parts["input_scales"].copy_(torch.linspace(0.3, 3, in_features))
        checks.assert_linear(scheme, parts, shape, dtype)


def test_large_weight_through_several_tiles() -> None:
    scheme = Int4(128)
    checks.assert_linear(scheme, scheme.quantize(checks.matrix(600, 8192), name="w"), (600, 8192), torch.bfloat16)


@KIND
def test_codes_are_those_of_torchao(symmetric: bool) -> None:
    """Scales and zero points are torchao's, up to the rounding to float16; so are the codes, given both."""
    weight_OI = checks.matrix(48, 256)
    parts = Int4(64, symmetric).quantize(weight_OI, name="w")
    scale_OG = parts["scales"].float()
    zero_OG = torch.full_like(scale_OG, 8).int() if symmetric else parts["zeros"].int()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        primitives = pytest.importorskip("torchao.quantization.quant_primitives")
        their_scale, their_zero = primitives.choose_qparams_affine(
            weight_OI, primitives.MappingType.ASYMMETRIC, (1, 64), torch.uint8, 0, 15, eps=2.0**-24
        )
        codes_OI = primitives.quantize_affine(weight_OI, (1, 64), scale_OG, zero_OG, torch.uint8, 0, 15)
        theirs_OI = primitives.dequantize_affine(codes_OI, (1, 64), scale_OG, zero_OG, torch.uint8, 0, 15)
    if not symmetric:
        torch.testing.assert_close(scale_OG, their_scale.float().view(48, -1), rtol=HALF, atol=2**-24)
        off = (zero_OG - their_zero.view(48, -1)).abs()
        assert int(off.max()) <= 1 and float((off == 0).float().mean()) >= 0.98
    # they multiply by 1 / scale: another rounding, which matters only right between two codes
    different = unpack_codes(parts["codes"], 48 * 256).view(48, 256) != codes_OI
    assert float(different.float().mean()) <= 0.002
    decoded_OI = checks.dense(Int4(64, symmetric), parts, (48, 256))
    torch.testing.assert_close(decoded_OI[~different], theirs_OI[~different], rtol=4 * checks.FLOAT32, atol=0)


@KIND
def test_parts_made_elsewhere(symmetric: bool) -> None:
    """A group at a time, a column at a time, as GPTQ does, gives what rounding the whole gives."""
    scheme, weight_OI = Int4(16, symmetric), checks.matrix(9, 64)
    codes, scales, zeros = [], [], []
    for start in range(0, 64, 16):
        scale_O, zero_O = scheme.group_parameters(weight_OI[:, start : start + 16])
        assert torch.equal(scale_O.half().float(), scale_O) and bool((scale_O != 0).all())
        codes += [scheme.round_to_codes(weight_OI[:, i], scale_O, zero_O) for i in range(start, start + 16)]
        scales.append(scale_O)
        zeros.append(zero_O)
    parts = scheme.pack(torch.stack(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1))
    whole = scheme.quantize(weight_OI, name="w")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in parts)
    decoded_OI = (torch.stack(codes, 1) - zeros[0][:, None]) * scales[0][:, None]
    assert torch.equal(checks.dense(scheme, parts, (9, 64))[:, :16], decoded_OI[:, :16])


def test_two_codes_in_a_byte_high_half_first() -> None:
    parts = Int4(4).pack(torch.tensor([[1.0, 2.0, 15.0, 0.0]]), torch.ones(1, 1), torch.zeros(1, 1))
    assert parts["codes"].tolist() == [0x12, 0xF0]


def test_input_scales_divide_what_is_decoded() -> None:
    scheme, weight_OI = Int4(16, input_scales=True), checks.matrix(6, 32)
    factors_I = torch.linspace(0.5, 2, 32)
    parts = scheme.quantize(weight_OI * factors_I, name="w")
    assert torch.equal(parts["input_scales"], torch.ones(32))
    parts["input_scales"] = factors_I
    plain = Int4(16).quantize(weight_OI * factors_I, name="w")
    expected_OI = checks.dense(Int4(16), plain, (6, 32)) / factors_I
    assert torch.equal(checks.dense(scheme, parts, (6, 32)), expected_OI)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Int4(128), 4 + 24 / 128),
        (Int4(128, symmetric=True), 4 + 16 / 128),
        (Int4(32, symmetric=True), 4.5),
        (Int4(128, input_scales=True), 4 + 24 / 128 + 32 / 512),
    ],
)
def test_bits(scheme: Scheme, bits: float) -> None:
    assert scheme.bits_per_weight(512, 1024) == bits


@KIND
def test_file(symmetric: bool, tmp_path: Path) -> None:
    scheme = Int4(8, symmetric, input_scales=True)
    checks.assert_saves(scheme, scheme.quantize(checks.matrix(9, 32), name="w"), tmp_path)


@KIND
def test_what_is_not_finite(symmetric: bool) -> None:
    checks.assert_refuses_what_is_not_finite(Int4(4, symmetric), (3, 8))


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        Int4(128).parts(1536, 576)
    assert str(caught.value) == (
        "group_size: 128 does not divide the 576 inputs of a linear of 1536 x 576, nearest: 72, 96, 144"
    )
    with pytest.raises(ConfigError, match="keep this linear dense"):
        Int4(2).parts(8, 101)


def test_settings() -> None:
    for scheme in (Int4(), Int4(64, symmetric=True), Int4(32, input_scales=True)):
        assert scheme_from_json(scheme.to_json()) == scheme
    for size in (0, -4, 7):
        with pytest.raises(ConfigError, match=f"group_size: is {size}, expected an even number"):
            Int4.make({"group_size": size})
    with pytest.raises(ConfigError, match="symmetric: is 1, expected bool"):
        Int4.make({"symmetric": 1})
