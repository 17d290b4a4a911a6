"""How large activations get, seen on sample rows: one range for all of a linear's inputs.

`minmax`: the largest magnitude. `percentile`: the magnitude below which so many percent of them lie. `mse`: the range
whose rounding and clipping to 8 bits give the least mean squared error. The last two read a histogram of magnitudes of
2,048 bins up to the largest seen, so they are exact to one bin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alpaca_lora.errors import NumericalError

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 2048
STEPS = 128  # ranges tried by mse
LARGEST = 127


def observe(inputs: Sequence[torch.Tensor], observer: str, percentile: float, *, name: str) -> float:
    """The largest magnitude to keep of chunks of activations (T, in); what lies beyond is clipped.

    NumericalError naming the linear when an activation is not finite.
    """
    largest = max((float(chunk.abs().max()) for chunk in inputs if chunk.numel()), default=0.0)
    if not largest < float("inf"):
        raise NumericalError("activations that are NaN or infinite on the calibration rows", field=name)
    if observer == "minmax" or largest == 0:
        return largest
    histogram = torch.zeros(BINS, dtype=torch.float64)
    for chunk in inputs:
        histogram += torch.histc(chunk.float().abs(), BINS, 0, largest).double()
    if observer == "percentile":
        reached = histogram.cumsum(0) / histogram.sum()
        first = int((reached < percentile / 100).sum())
        return largest * min(first + 1, BINS) / BINS
    return _least_error(histogram, largest)


def _least_error(histogram: torch.Tensor, largest: float) -> float:
    """The range with the least sum of squared differences, each bin standing for its middle."""
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    best, best_error = largest, float("inf")
    for step in range(1, STEPS + 1):
        range_ = largest * step / STEPS
        scale = range_ / LARGEST
        kept = (middles / scale).round().clamp(max=LARGEST) * scale
        error = float((histogram * (kept - middles).square()).sum())
        if error < best_error:
            best, best_error = range_, error
    return best
