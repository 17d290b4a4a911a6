"""Ranges of activations: against sorting and against trying every range, in bounded memory, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.observers import LARGEST, OBSERVERS, Magnitudes, observe

NEAR = 2.0**-11  # width of a bin, relative


def activations(dtype: torch.dtype = torch.float32, *, outliers: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    """Chunks of unequal length; a few numbers are ``outliers`` times as large as the rest."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(700, 24, generator=generator)
    x_TI.view(-1)[::4001] *= outliers
    return list(x_TI.to(dtype).split([1, 300, 399]))


def squared_error(chunks: list[torch.Tensor], largest: float) -> float:
    x_TI, scale = torch.cat(chunks).double(), largest / LARGEST
    return float((((x_TI / scale).round().clamp(-LARGEST, LARGEST) * scale) - x_TI).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minmax_is_the_largest_magnitude(dtype: torch.dtype) -> None:
    chunks = activations(dtype)
    chunks[1][7, 3] = -9.3
    assert observe(chunks, "minmax", 99.9, name="w") == float(torch.cat(chunks).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("percentile", [50.5, 90.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("outliers", [1.0, 1e4])
def test_percentile_is_that_of_sorting(dtype: torch.dtype, percentile: float, outliers: float) -> None:
    chunks = activations(dtype, outliers=outliers)
    ordered = torch.cat(chunks).abs().float().view(-1).sort().values
    expected = float(ordered[-(-len(ordered) * percentile // 100).__trunc__() - 1])
    found = observe(chunks, "percentile", percentile, name="w")
    if dtype == torch.bfloat16:
        assert found == expected
    else:
        assert expected * (1 - NEAR) <= found <= expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outliers", [1.0, 30.0, 1e4])
def test_mse_is_as_good_as_any_range(dtype: torch.dtype, outliers: float) -> None:
    chunks = activations(dtype, outliers=outliers)
    largest = float(torch.cat(chunks).abs().max())
    found = observe(chunks, "mse", 99.9, name="w")
    tried = min(squared_error(chunks, largest * 0.98**step) for step in range(500))
    assert found <= largest
    assert squared_error(chunks, found) <= 1.02 * tried


def test_mse_cuts_an_outlier_off() -> None:
    chunks = [torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))]
    chunks[0][3, 3] = 20
    found = observe(chunks, "mse", 99.9, name="w")
    assert 4 < found < 10 and squared_error(chunks, found) < 0.6 * squared_error(chunks, 20)


def test_outliers_do_not_blur_the_rest() -> None:
    """A histogram of equal steps would put everything but the outliers into its first bin."""
    chunks = activations(outliers=1e5)
    assert 3 < observe(chunks, "percentile", 99.9, name="w") < 4


@pytest.mark.parametrize("observer", OBSERVERS)
def test_chunks_do_not_matter(observer: str) -> None:
    chunks = activations(outliers=20)
    whole = observe([torch.cat(chunks)], observer, 99.0, name="w")
    assert observe(chunks, observer, 99.0, name="w") == whole
    assert observe(iter(reversed(chunks)), observer, 99.0, name="w") == whole
    assert observe([-chunk for chunk in chunks], observer, 99.0, name="w") == whole


@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_and_constants(observer: str) -> None:
    assert observe([torch.zeros(3, 4)], observer, 99.9, name="w") == 0
    assert observe([torch.zeros(0, 4), torch.full((2, 4), 0.5)], observer, 99.9, name="w") == pytest.approx(0.5)


def test_a_percentile_of_zero_is_no_range() -> None:
    """Where nearly all activations are zero, as behind a ReLU, the percentile is, too; the others are kept."""
    chunks = [torch.zeros(100, 100)]
    chunks[0][3, 4] = 0.5
    assert observe(chunks, "percentile", 99.9, name="w") == 0.5
    assert observe(chunks, "percentile", 99.995, name="w") == 0.5


@pytest.mark.parametrize("value", [1e-36, 3e38])
def test_the_ends_of_float32(value: float) -> None:
    found = [observe([torch.full((2, 2), value)], observer, 99.9, name="w") for observer in OBSERVERS]
    assert all(0.99 * value <= one <= value * 1.0001 for one in found)


def test_memory_does_not_grow_with_the_rows() -> None:
    seen = Magnitudes()
    for seed in range(3):
        for chunk in activations(seed=seed):
            seen.add(chunk, name="w")
    assert seen.counts.numel() * seen.counts.element_size() < 2**23
    assert int(seen.counts.sum()) == 3 * 700 * 24


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_finite(observer: str, value: float, place: int) -> None:
    chunks = activations(torch.bfloat16)
    chunks[place][-1, 5] = value
    with pytest.raises(NumericalError, match=r"down_proj: activations that are NaN or infinite on the calibration"):
        observe(chunks, observer, 99.9, name="down_proj")
