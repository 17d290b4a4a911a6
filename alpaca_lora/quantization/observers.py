"""How large activations get, seen on sample rows: one range for all of a linear's inputs.

`minmax`: the largest magnitude. `percentile`: the magnitude below which so many percent of them lie. `mse`: the range
whose rounding and clipping to 8 bits give the least mean squared error.

Magnitudes are counted by their leading bits (sign off, 8 of exponent, 11 of fraction), in bins that are as fine beside
zero as far from it, since a few activations may be a thousand times the others. What is seen is not kept: 4 MB hold any
number of rows. Every bfloat16 number has a bin of its own, so with those both are exact; a float32 number is taken for
the lower end of its bin, less than 1 in 2,048 below.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from alpaca_lora.errors import NumericalError

OBSERVERS = ("minmax", "percentile", "mse")
LARGEST = 127
DROPPED_BITS = 12  # of a float32
INFINITE = 0x7F800000 >> DROPPED_BITS  # the first bin that is no number
PIECE = 2**22  # elements counted at once
OCTAVES, COARSE, FINE = 16, 8, 16  # mse tries ranges down to 2^-16 of the largest, so many of each halving, then nearer


class Magnitudes:
    """How often each magnitude was seen."""

    def __init__(self) -> None:
        self.counts = torch.zeros(INFINITE, dtype=torch.int64)
        self.largest = 0.0

    def add(self, chunk: torch.Tensor, *, name: str) -> None:
        """Count activations of any shape. NumericalError naming the linear when one is not finite."""
        for piece in chunk.detach().reshape(-1).split(PIECE):
            magnitudes = piece.float().abs()
            largest = float(magnitudes.max()) if magnitudes.numel() else 0.0
            if not largest < float("inf"):  # NaN is not
                raise NumericalError("activations that are NaN or infinite on the calibration rows", field=name)
            self.largest = max(self.largest, largest)
            self.counts += torch.bincount(magnitudes.view(torch.int32) >> DROPPED_BITS, minlength=INFINITE).cpu()

    def percentile(self, percent: float) -> float:
        """The least magnitude that ``percent`` % of all do not exceed."""
        if percent >= 100:
            return self.largest
        reached = self.counts.cumsum(0).double()
        place = int(torch.searchsorted(reached, reached[-1:] * (percent / 100)))
        return float(_lower_ends(torch.tensor([place])))

    def least_error(self) -> float:
        """The range whose 8 bits give the least sum of squared differences."""
        (bins,) = self.counts.nonzero(as_tuple=True)
        counts, values = self.counts[bins].double(), _lower_ends(bins).double()

        def error(largest: float) -> float:
            scale = largest / LARGEST
            kept = (values / scale).round_().clamp_(max=LARGEST).mul_(scale)
            return float(counts @ kept.sub_(values).square_())

        best = min((self.largest * 2 ** (-step / COARSE) for step in range(OCTAVES * COARSE + 1)), key=error)
        near = [best * 2 ** (step / COARSE / FINE) for step in range(1 - FINE, FINE)]
        return min((largest for largest in near if largest <= self.largest), key=error)


def observe(inputs: Iterable[torch.Tensor], observer: str, percentile: float, *, name: str) -> float:
    """The largest magnitude to keep of chunks of activations (T, in); what lies beyond is clipped. 0: all are zero. A
    percentile that is zero since most activations are is no range: nothing is clipped then.

    NumericalError naming the linear when an activation is not finite.
    """
    seen = Magnitudes()
    for chunk in inputs:
        seen.add(chunk, name=name)
    if observer == "minmax" or seen.largest == 0:
        return seen.largest
    if observer == "percentile":
        return seen.percentile(percentile) or seen.largest
    return seen.least_error()


def _lower_ends(bins: torch.Tensor) -> torch.Tensor:
    """float32 lower end of each bin."""
    return (bins.to(torch.int32) << DROPPED_BITS).view(torch.float32)
