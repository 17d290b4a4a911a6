"""AWQ: inputs that are large get finer codes. W is multiplied by a factor for each input before it is rounded, and what
is decoded is divided by it.

Lin et al. 2023, section 3.2: s = a^alpha with a the mean magnitude of each input, alpha from a grid by the least error
of the outputs on the calibration rows. The factors stay beside the codes instead of moving into the layer before.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.quantization.int4 import Int4

ALPHAS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4  # of an input's mean magnitude, over the largest


def awq(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, magnitude_I: torch.Tensor, scheme: Int4, *, name: str
) -> tuple[Int4, dict[str, torch.Tensor]]:
    """(scheme with input scales, its parts) of a weight (out, in), given X^T X (in any multiple) and the mean magnitude
    of each input on the calibration rows. alpha 0 is plain rounding, so the error on those rows is never larger.
    """
    scheme = replace(scheme, input_scales=True)
    weight_OI = weight_OI.float()
    if not (bool(torch.isfinite(magnitude_I).all()) and bool(torch.isfinite(hessian_II).all())):
        raise NumericalError("activations that are NaN or infinite on the calibration rows", field=name)
    magnitude_I = (magnitude_I / magnitude_I.max().clamp_min(SMALLEST)).clamp_min(SMALLEST)
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    for alpha in ALPHAS:
        factors_I = magnitude_I.pow(alpha)
        factors_I = factors_I / (factors_I.max() * factors_I.min()).sqrt()
        parts = scheme.quantize(weight_OI * factors_I, name=name)
        parts["input_scales"] = factors_I
        num_out, num_in = weight_OI.shape
        decoded_OI = scheme.tile(parts, (num_out, num_in), slice(0, num_out), slice(0, num_in), torch.float32)
        wrong_OI = decoded_OI - weight_OI
        # the mean squared error of the outputs: the trace of dW H dW^T
        error = float(((wrong_OI @ hessian_II) * wrong_OI).sum())
        if best is None or error < best[0]:
            best = error, parts
    assert best is not None
    return scheme, best[1]
