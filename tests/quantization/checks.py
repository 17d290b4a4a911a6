"""What holds for every scheme, as functions that the test of each scheme calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.scheme import Parts, Scheme
from alpaca_lora.weights.safetensors_file import read_safetensors, write_safetensors

BFLOAT16 = 2.0**-9  # half a unit in the last place, relative
FLOAT32 = 2.0**-24


def matrix(out_features: int, in_features: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A weight like those of a model: small numbers, a large one, and a row of zeros where there are rows enough."""
    generator = torch.Generator().manual_seed(seed + 31 * out_features + in_features)
    weight_OI = torch.randn(out_features, in_features, generator=generator) * 0.05
    weight_OI[0, in_features // 2] = 0.7
    if out_features > 2:
        weight_OI[2] = 0
    return weight_OI.to(dtype)


def dense(scheme: Scheme, parts: Parts, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole decoded weight."""
    return scheme.tile(parts, shape, slice(0, shape[0]), slice(0, shape[1]), dtype)


def assert_stored_as_promised(scheme: Scheme, parts: Parts, shape: tuple[int, int]) -> None:
    """Names, shapes, dtypes and bits are those that the scheme says."""
    promised = scheme.parts(*shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {n: tuple(p) for n, p in promised.items()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    assert scheme.bits_per_weight(*shape) == pytest.approx(8 * num_bytes / (shape[0] * shape[1]))


def assert_tiles_agree(scheme: Scheme, parts: Parts, shape: tuple[int, int]) -> None:
    """Any tile is bit-equal to that place of the whole weight, in both dtypes."""
    rows = [slice(0, 1), slice(shape[0] // 2, shape[0]), slice(0, shape[0])]
    columns = [slice(0, 1), slice(shape[1] // 3, shape[1]), slice(shape[1] - 1, shape[1]), slice(0, shape[1])]
    for dtype in (torch.float32, torch.bfloat16):
        whole = dense(scheme, parts, shape, dtype)
        for some in rows:
            for others in columns:
                tile = scheme.tile(parts, shape, some, others, dtype)
                assert tile.dtype == dtype and torch.equal(tile, whole[some, others])


def off_by(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> float:
    """How far ``got`` is from left @ right, over what rounding in ``dtype`` may do: at most 1 when all is well.

    Of each number: one factor and three times the result may be off by half a unit of the dtype, sums of n products in
    float32 by n halves of its unit. Of the whole in its norm: the same, where errors of the sums are independent.
    """
    exact, wrong = left.double() @ right.double(), got.double() - left.double() @ right.double()
    unit, num_products = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32, left.shape[1]
    sizes = left.double().abs() @ right.double().abs()
    worst = (wrong.abs() / (sizes * (4 * unit + num_products * FLOAT32)).clamp_min(1e-30)).max()
    mean = wrong.norm() / (exact.norm() * (4 * unit + 2 * num_products**0.5 * FLOAT32)).clamp_min(1e-30)
    return max(float(worst), float(mean))


def assert_linear(
    scheme: Scheme, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, num_tokens: int = 5
) -> None:
    """y = x W^T and dx = dy W with the decoded W; a W that is 2 % larger fails."""
    weight_OI = dense(scheme, parts, shape)
    generator = torch.Generator().manual_seed(sum(shape))
    x_TI = torch.randn(num_tokens, shape[1], generator=generator).to(dtype).requires_grad_()
    dy_TO = torch.randn(num_tokens, shape[0], generator=generator).to(dtype)
    y_TO = scheme.apply(x_TI, parts, shape)
    y_TO.backward(dy_TO)
    assert y_TO.dtype == dtype and x_TI.grad is not None and x_TI.grad.dtype == dtype
    x_TI, dx_TI, y_TO = x_TI.detach(), x_TI.grad, y_TO.detach()
    assert off_by(y_TO, x_TI, weight_OI.t(), dtype) <= 1
    assert off_by(dx_TI, dy_TO, weight_OI, dtype) <= 1
    assert off_by(y_TO, x_TI, 1.02 * weight_OI.t(), dtype) > 1
    assert off_by(dx_TI, dy_TO, 1.02 * weight_OI, dtype) > 1


def assert_saves(scheme: Scheme, parts: dict[str, torch.Tensor], folder: Path) -> None:
    """A file gives the parts back bit by bit and is checked: a scale that is NaN is refused by name and file."""
    path = folder / "parts.safetensors"
    write_safetensors(path, parts)
    read = read_safetensors(path)
    assert set(read) == set(parts)
    for name, tensor in parts.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    scheme.check_parts(read, name="model.q_proj", file=path)
    read["scales"].view(-1)[0] = float("nan")
    with pytest.raises(NumericalError, match=r"parts\.safetensors: model\.q_proj\.scales: NaN or infinite"):
        scheme.check_parts(read, name="model.q_proj", file=path)


def assert_refuses_what_is_not_finite(scheme: Scheme, shape: tuple[int, int]) -> None:
    """NaN and infinities in any place of the weight are refused by the weight's name."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, shape[0] - 1):
            weight_OI = matrix(*shape, dtype=torch.bfloat16)
            weight_OI[row, -1] = value
            with pytest.raises(NumericalError, match=r"layers\.3\.up_proj: weights that are NaN or infinite"):
                scheme.quantize_calibrated(weight_OI, [torch.ones(2, shape[1])], name="layers.3.up_proj")
