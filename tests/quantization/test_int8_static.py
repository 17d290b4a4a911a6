"""int8 activations by a scale of sample rows: each observer, clipping, the definition, the gradient, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import ConfigError, NumericalError
from alpaca_lora.kernels import reference
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.int8_static import Int8Static
from alpaca_lora.quantization.observers import OBSERVERS, observe
from alpaca_lora.quantization.scheme import scheme_class, scheme_from_json
from tests.quantization import checks

SHAPES = [(1, 1), (5, 1), (5, 7), (31, 101), (64, 192), (300, 700)]
SCHEME = Int8Static()


def rows(in_features: int, *, count: int = 200, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + in_features)
    return [torch.randn(count, in_features, generator=generator) for _ in range(2)]


def made(shape: tuple[int, int], scheme: Int8Static = SCHEME) -> dict[str, torch.Tensor]:
    return scheme.quantize_calibrated(checks.matrix(*shape), rows(shape[1]), name="w")


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts(observer: str, shape: tuple[int, int], tmp_path: Path) -> None:
    scheme = Int8Static(observer, 99.0)
    parts = made(shape, scheme)
    checks.assert_stored_as_promised(scheme, parts, shape)
    checks.assert_tiles_agree(scheme, parts, shape)
    checks.assert_saves(scheme, parts, tmp_path)
    expected = observe(rows(shape[1]), observer, 99.0, name="w") / 127
    assert float(parts["input_scale"]) == pytest.approx(expected, rel=2 * checks.FLOAT32)
    weight = Int8().quantize(checks.matrix(*shape), name="w")
    assert all(torch.equal(parts[name], weight[name]) for name in weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 600])
def test_as_the_definition(shape: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    """Beyond the range too: activations are up to three times those of the sample rows."""
    parts = made(shape)
    x_TI = 3 * rows(shape[1], count=count, seed=1)[0].to(dtype)
    dy_TO = rows(shape[0], count=count, seed=2)[0].to(dtype)
    ours = x_TI.clone().requires_grad_()
    y_TO = SCHEME.apply(ours, parts, shape)
    y_TO.backward(dy_TO)
    expected_TO = reference.integer_linear(x_TI.float(), parts["codes"], parts["scales"], parts["input_scale"])
    through_TO = (x_TI.float() @ (parts["codes"].float() * parts["scales"][:, None]).t()).abs()
    unit = checks.BFLOAT16 if dtype == torch.bfloat16 else checks.FLOAT32
    allowed_TO = 4 * unit * expected_TO.abs() + (4 + shape[1]) * checks.FLOAT32 * through_TO + 1e-30
    assert y_TO.dtype == dtype and bool(((y_TO.detach().float() - expected_TO).abs() <= allowed_TO).all())
    # straight-through: clipped activations get their gradient too
    assert ours.grad is not None
    assert checks.off_by(ours.grad, dy_TO, checks.dense(SCHEME, parts, shape), dtype) <= 1


def test_activations_beyond_the_range_are_clipped() -> None:
    parts = SCHEME.quantize_calibrated(torch.eye(4), [torch.eye(4)], name="w")
    largest = 127 * float(parts["input_scale"])
    x_TI = torch.tensor([[50.0, -50.0, 0.25, float("inf")]])
    y_TO = SCHEME.apply(x_TI, parts, (4, 4))
    torch.testing.assert_close(y_TO, torch.tensor([[largest, -largest, 0.25, largest]]), rtol=1e-6, atol=largest / 254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 600])
def test_nan_is_not_hidden(count: int, dtype: torch.dtype) -> None:
    """Whole numbers have no NaN: rounded alone, it would be a zero."""
    parts = made((31, 101))
    x_TI = rows(101, count=count)[0].to(dtype)
    expected_TO = SCHEME.apply(x_TI, parts, (31, 101))
    x_TI[1, 7], x_TI[2, :2] = float("nan"), torch.tensor([float("inf"), -float("inf")])
    expected_TO[2] = SCHEME.apply(x_TI[2:3].clamp(-1e3, 1e3), parts, (31, 101))[0]  # infinities are clipped, no more
    y_TO = SCHEME.apply(x_TI, parts, (31, 101))
    assert bool(y_TO[1].isnan().all())
    assert torch.equal(y_TO[0], expected_TO[0]) and torch.equal(y_TO[2:], expected_TO[2:])


def test_one_scale_is_worse_than_one_for_each_token_only_by_so_much() -> None:
    parts = made((64, 512), Int8Static())
    x_TI = rows(512, seed=3)[0]
    exact_TO = x_TI @ checks.dense(SCHEME, parts, (64, 512)).t()
    relative = float((SCHEME.apply(x_TI, parts, (64, 512)) - exact_TO).norm() / exact_TO.norm())
    assert 0.004 < relative < 0.015


def test_weight_alone_is_not_enough() -> None:
    assert scheme_class("int8_static").needs_calibration
    with pytest.raises(ConfigError, match=r"calibration_data: .*int8_static.*rows.*model\.q_proj"):
        SCHEME.quantize(checks.matrix(4, 8), name="model.q_proj")


def test_rows_that_say_nothing() -> None:
    with pytest.raises(NumericalError, match="q_proj: activations that are all zero on the calibration rows"):
        SCHEME.quantize_calibrated(checks.matrix(4, 8), [torch.zeros(5, 8)], name="q_proj")
    with pytest.raises(NumericalError, match="q_proj: activations that are NaN or infinite"):
        SCHEME.quantize_calibrated(
            checks.matrix(4, 8), [torch.ones(5, 8), torch.full((1, 8), torch.nan)], name="q_proj"
        )


def test_what_is_not_finite_in_the_weight() -> None:
    checks.assert_refuses_what_is_not_finite(SCHEME, (3, 5))


def test_a_file_whose_input_scale_is_not_finite() -> None:
    parts = made((5, 7))
    parts["input_scale"][0] = float("inf")
    with pytest.raises(NumericalError, match=r"f: q_proj\.input_scale: NaN or infinite"):
        SCHEME.check_parts(parts, name="q_proj", file="f")


def test_settings() -> None:
    for scheme in (Int8Static(), Int8Static("percentile", 99.5), Int8Static("minmax")):
        assert scheme_from_json(scheme.to_json()) == scheme
    assert Int8Static.make({"observer": "percentile", "percentile": 99}) == Int8Static("percentile", 99.0)
    with pytest.raises(ConfigError, match="observer: is 'median', expected one of minmax, percentile, mse"):
        Int8Static.make({"observer": "median"})
    for percentile in (50.0, 100.5, float("nan")):
        with pytest.raises(ConfigError, match="percentile: is"):
            Int8Static.make({"percentile": percentile})
