"""The low-rank addition for linears that share their input, as one autograd node.

With M the dropout mask, s_i the scale over 1 - p, U = (x * M) [A_1; A_2; ...]^T:   y_i += s_i U_i B_i^T
backward, with G_i = s_i dY_i B_i:
    dB_i = s_i dY_i^T U_i   dA_i = G_i^T (x * M)   dX += ([G_1 G_2 ...] [A_1; A_2; ...]) * M

Kept for backward: x itself, no masked copy, and the rank-wide U. The mask is drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alpaca_lora.kernels.dropout import DropoutKey, keep_bits, mask_bits


class _LoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, dropout: DropoutKey | None, scales: tuple[float, ...], *rest: torch.Tensor
    ):
        n = len(scales)
        outputs, As, Bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dtype = x_TD.dtype
        a_cat = torch.cat([a.to(dtype) for a in As])
        dropped = x_TD if dropout is None else mask_bits(x_TD, keep_bits(dropout, x_TD.shape[1]))
        u_TR = dropped @ a_cat.t()
        for y, u, b, s in zip(outputs, u_TR.split([a.shape[0] for a in As], dim=1), Bs, scales, strict=True):
            y.addmm_(u, b.to(dtype).t(), alpha=s)
        ctx.mark_dirty(*outputs)
        ctx.save_for_backward(x_TD, u_TR, *As, *Bs)
        ctx.dropout, ctx.scales = dropout, scales
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        n = len(ctx.scales)
        x_TD, u_TR, *factors = ctx.saved_tensors  # asked once: each asking would recompute a checkpointed layer
        As, Bs = factors[:n], factors[n:]
        dtype, ranks = x_TD.dtype, [a.shape[0] for a in As]
        g_TR = torch.cat([(dy @ b.to(dtype)).mul_(s) for dy, b, s in zip(grads, Bs, ctx.scales, strict=True)], dim=1)
        dBs = tuple(
            (dy.t() @ u).float().mul_(s) for dy, u, s in zip(grads, u_TR.split(ranks, dim=1), ctx.scales, strict=True)
        )
        bits = None if ctx.dropout is None else keep_bits(ctx.dropout, x_TD.shape[1])
        da_cat = (g_TR.t() @ (x_TD if bits is None else mask_bits(x_TD, bits))).float()
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_TD = g_TR @ torch.cat([a.to(dtype) for a in As])
            if bits is not None:
                dx_TD = mask_bits(dx_TD, bits, in_place=True)
        return dx_TD, None, None, *grads, *da_cat.split(ranks), *dBs


def lora_add(
    outputs: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    dropout: DropoutKey | None = None,
) -> tuple[torch.Tensor, ...]:
    """As `reference.lora_add`; the outputs are changed in place."""
    chosen = [i for i, a in enumerate(As) if a is not None]
    if not chosen:
        return tuple(outputs)
    key = None if dropout is None or dropout.p == 0 else dropout
    rescale = 1.0 if key is None else 1 / (1 - key.p)
    results = _LoraAdd.apply(
        x_TD, key, tuple(scales[i] * rescale for i in chosen),
        *(outputs[i] for i in chosen), *(As[i] for i in chosen), *(Bs[i] for i in chosen),
    )  # fmt: skip
    added = list(outputs)
    for i, result in zip(chosen, results, strict=True):
        added[i] = result
    return tuple(added)
