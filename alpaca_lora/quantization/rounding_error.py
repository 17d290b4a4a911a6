"""What quantizing took from linears, as products of two small matrices: where a LoRA adapter beside them can start.

With E = W - Q(W) (out, in), X (T, in) what the linear sees on sample rows, H = X^T X / T = L L^T and E L = U S V^T, the
pair that makes up for most of the error of the outputs at rank R, ||X (E - B A)^T||_F, is

    B = U_R S_R      A = V_R^T L^-1

(Zhang et al. 2024, QERA, theorem 1, with another root of H; with H = 1 it is the first step of Li et al. 2023, LoftQ).
Layer by layer: what a linear sees has gone through layers whose errors are made up for already.

On the 135M model in NF4 a rank of 16 takes two thirds of what quantizing costs in loss; the errors' own principal part,
H left out, a seventh: they are close to noise, and what tells directions apart is what goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alpaca_lora.kernels.tiled import spans
from alpaca_lora.kernels.truncated_svd import truncated_svd
from alpaca_lora.quantization.calibrate import OnProgress
from alpaca_lora.quantization.gptq import damped_factors, hessian, too_few_rows
from alpaca_lora.quantization.layer_walk import Inputs, LayerWalk, Rows, check_rows
from alpaca_lora.quantization.linear import QuantizedLinear

# (A (R, in), B (out, R)), float32, of a linear
OnFit = Callable[[str, torch.Tensor, torch.Tensor], None]
FIELD = "init_lora_weights"
A_NORM = 3**-0.5  # of a row of A at the start that changes nothing, so that a learning rate means the same for both


@dataclass(frozen=True)
class Wanted:
    """Of one packed linear: the dense weight's name, and the rank of the pair."""

    weight: str
    rank: int


@torch.no_grad()
def fit_rounding_errors(
    walk: LayerWalk, wanted: Mapping[str, Wanted], dense: Callable[[str], torch.Tensor], rows: Rows, on_fit: OnFit,
    on_progress: OnProgress | None = None,
) -> dict[str, float]:  # fmt: skip
    """Fit a pair for each packed linear of ``walk``, whose model is loaded -> linear -> what part of the mean square
    of its output error the pair leaves (with the damping of H: a little more than on the rows).

    ``wanted``: by the module's name; they lie in layers. ``dense``: the weight (out, in) that a linear was made of.
    ``on_fit`` has to put the pair beside its linear, before the next layer is looked at. ConfigError for too few rows;
    NumericalError naming the linear when its inputs are not finite.
    """
    check_rows(rows, FIELD)
    streams, left = walk.streams(rows), dict[str, float]()
    for index in range(len(walk)):
        names = walk.inside(index, list(wanted))
        for name, lower_II in _factors(walk.inputs(index, names, streams)):
            packed: Any = walk.model.get_submodule(name)
            a, b, left[name] = _fit(packed, wanted[name], dense(wanted[name].weight), lower_II)
            on_fit(name, a, b)
        walk.advance(index, streams)
        if on_progress is not None:
            here = [left[name] for name in names]
            what = f", {1 - sum(here) / len(here):.0%} of the error taken" if here else ""
            on_progress(index + 1, len(walk), f"layer {index + 1}{what}")
    return left


def _factors(seen: Mapping[str, Inputs]) -> list[tuple[str, torch.Tensor]]:
    """(linear, L of its inputs); linears that share an input share L."""
    found, last, lower_II = [], list[torch.Tensor](), None
    for name, inputs in seen.items():
        if lower_II is None or not all(a is b for a, b in zip(last, inputs, strict=True)):
            last, hessian_II = inputs, hessian(inputs)
            if not bool(torch.isfinite(hessian_II).all()):
                raise too_few_rows(name)
            lower_II = next(damped_factors(hessian_II), None)
            if lower_II is None:
                raise too_few_rows(name)
            lower_II = lower_II.float()
        found.append((name, lower_II))
    return found


def _fit(
    packed: QuantizedLinear, wanted: Wanted, weight_OI: torch.Tensor, lower_II: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A, B, what part of the mean square of the output error is left)."""
    error_OI = torch.empty(packed.shape, device=lower_II.device)
    for rows in spans(*packed.shape):
        tile = packed.scheme.tile(
            packed.stored_parts(), packed.shape, rows, slice(0, packed.in_features), torch.float32
        )
        torch.sub(weight_OI[rows].to(tile), tile, out=error_OI[rows])
    seen_OI = error_OI @ lower_II
    whole = float(seen_OI.square().sum(dtype=torch.float64))
    u_OR, values_R, vt_RI = truncated_svd(seen_OI, wanted.rank, f"rounding error\0{wanted.weight}")
    taken = float(values_R.square().sum(dtype=torch.float64))
    a_RI = torch.linalg.solve_triangular(lower_II, vt_RI.to(lower_II), upper=False, left=False)
    norms_R = a_RI.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    a_RI = a_RI * (A_NORM / norms_R)[:, None]
    b_OR = u_OR.to(lower_II) * (values_R.to(lower_II) * norms_R / A_NORM)
    return a_RI.contiguous(), b_OR.contiguous(), max(0.0, 1 - taken / whole) if whole else 0.0
