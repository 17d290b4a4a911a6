"""The low-rank addition for linears that share their input, as one autograd node.

With M the dropout mask, s_i the scale over 1 - p, U = (x * M) [A_1; A_2; ...]^T:   y_i += s_i U_i B_i^T
backward, with G_i = s_i dY_i B_i:
    dB_i = s_i dY_i^T U_i   dA_i = G_i^T (x * M)   dX += ([G_1 G_2 ...] [A_1; A_2; ...]) * M

A constant pair (A0_i, B0_i) lies beside the trained one in the same products, as [A_i; A0_i] and [B_i B0_i]: where the
two cancel (PiSSA), they do so before anything is rounded to y's dtype. It gets no gradient, nor does a factor that asks
for none.

Kept for backward: x itself, no masked copy, and the rank-wide U. The mask is drawn again.

`lora_learn` has that backward without the addition: for outputs that hold the update already, in a weight that was
rounded as a whole. There x gets no gradient: that of the rounded weight is all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alpaca_lora.kernels.dropout import DropoutKey, keep_bits, mask_bits

Pair = tuple[torch.Tensor, torch.Tensor]


class _LoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, dropout: DropoutKey | None, scales: tuple[float, ...],
        constants: tuple[Pair | None, ...], *rest: torch.Tensor,
    ):  # fmt: skip
        n = len(scales)
        outputs, As, Bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dtype = x_TD.dtype
        wide_As, wide_Bs = _beside(As, Bs, constants, dtype)
        dropped = x_TD if dropout is None else mask_bits(x_TD, keep_bits(dropout, x_TD.shape[1]))
        us = (dropped @ torch.cat(wide_As).t()).split([a.shape[0] for a in wide_As], dim=1)
        for y, u, b, s in zip(outputs, us, wide_Bs, scales, strict=True):
            y.addmm_(u, b.t(), alpha=s)
        ctx.mark_dirty(*outputs)
        ctx.save_for_backward(x_TD, *us, *As, *Bs)
        ctx.dropout, ctx.scales, ctx.constants = dropout, scales, constants
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        n, scales = len(ctx.scales), ctx.scales
        x_TD, *saved = ctx.saved_tensors  # asked once: each asking would recompute a checkpointed layer
        us, As, Bs = saved[:n], saved[n : 2 * n], saved[2 * n :]
        needs_x, needs_A, needs_B = (
            ctx.needs_input_grad[0], ctx.needs_input_grad[4 + n : 4 + 2 * n], ctx.needs_input_grad[4 + 2 * n :],
        )  # fmt: skip
        ranks = [a.shape[0] for a in As]
        wide_As, wide_Bs = _beside(As, Bs, ctx.constants, x_TD.dtype)
        gs = [(dy @ b).mul_(s) for dy, b, s in zip(grads, wide_Bs, scales, strict=True)]
        dBs = _gradients_of_B(grads, us, ranks, scales, needs_B)
        bits = None if ctx.dropout is None else keep_bits(ctx.dropout, x_TD.shape[1])
        dAs = _gradients_of_A(x_TD if bits is None or not any(needs_A) else mask_bits(x_TD, bits), gs, ranks, needs_A)
        dx_TD = None
        if needs_x:
            dx_TD = torch.cat(gs, dim=1) @ torch.cat(wide_As)
            if bits is not None:
                dx_TD = mask_bits(dx_TD, bits, in_place=True)
        return dx_TD, None, None, None, *grads, *dAs, *dBs


class _LoraLearn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, scales: tuple[float, ...], *rest: torch.Tensor):
        n = len(scales)
        ctx.mark_dirty(*rest[:n])
        ctx.save_for_backward(x_TD, *rest[n:])
        ctx.scales = scales
        return rest[:n]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        n, scales = len(ctx.scales), ctx.scales
        x_TD, *saved = ctx.saved_tensors
        As, Bs = [a.to(x_TD.dtype) for a in saved[:n]], [b.to(x_TD.dtype) for b in saved[n:]]
        needs_A, needs_B = ctx.needs_input_grad[2 + n : 2 + 2 * n], ctx.needs_input_grad[2 + 2 * n :]
        ranks = [a.shape[0] for a in As]
        us = (x_TD @ torch.cat(As).t()).split(ranks, dim=1)
        gs = [(dy @ b).mul_(s) for dy, b, s in zip(grads, Bs, scales, strict=True)]
        dAs = _gradients_of_A(x_TD, gs, ranks, needs_A)
        return None, None, *grads, *dAs, *_gradients_of_B(grads, us, ranks, scales, needs_B)


def _gradients_of_B(
    grads: Sequence[torch.Tensor], us: Sequence[torch.Tensor], ranks: Sequence[int], scales: Sequence[float],
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:  # fmt: skip
    """s_i dY_i^T U_i of the trained columns, float32."""
    return [
        (dy.t() @ u[:, :rank]).float().mul_(s) if wanted else None
        for dy, u, rank, s, wanted in zip(grads, us, ranks, scales, needed, strict=True)
    ]


def _gradients_of_A(
    x_TD: torch.Tensor, gs: Sequence[torch.Tensor], ranks: Sequence[int], needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """G_i^T x of the trained rows, float32: one product for all."""
    das: list[torch.Tensor | None] = [None] * len(gs)
    wanted = [i for i, one in enumerate(needed) if one]
    if wanted:
        g_TR = torch.cat([gs[i][:, : ranks[i]] for i in wanted], dim=1)
        for i, da in zip(wanted, (g_TR.t() @ x_TD).float().split([ranks[i] for i in wanted]), strict=True):
            das[i] = da
    return das


def _beside(
    As: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor], constants: Sequence[Pair | None], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """[A_i; A0_i] and [B_i B0_i] in `dtype`; the trained factors alone where there is no constant pair."""
    As, Bs = [a.to(dtype) for a in As], [b.to(dtype) for b in Bs]
    for i, pair in enumerate(constants):
        if pair is not None:
            As[i], Bs[i] = torch.cat((As[i], pair[0].to(dtype))), torch.cat((Bs[i], pair[1].to(dtype)), dim=1)
    return As, Bs


def lora_add(
    outputs: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    dropout: DropoutKey | None = None,
    constants: Sequence[Pair | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """As `reference.lora_add`; the outputs are changed in place."""
    chosen = [i for i, a in enumerate(As) if a is not None]
    if not chosen:
        return tuple(outputs)
    key = None if dropout is None or dropout.p == 0 else dropout
    rescale = 1.0 if key is None else 1 / (1 - key.p)
    results = _LoraAdd.apply(
        x_TD, key, tuple(scales[i] * rescale for i in chosen),
        tuple(None if constants is None else constants[i] for i in chosen),
        *(outputs[i] for i in chosen), *(As[i] for i in chosen), *(Bs[i] for i in chosen),
    )  # fmt: skip
    added = list(outputs)
    for i, result in zip(chosen, results, strict=True):
        added[i] = result
    return tuple(added)


def lora_learn(
    outputs: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
) -> tuple[torch.Tensor, ...]:
    """As `reference.lora_learn`: the outputs as they are, in the same memory; their gradient goes to A and B too."""
    chosen = [i for i, a in enumerate(As) if a is not None]
    if not chosen:
        return tuple(outputs)
    results = _LoraLearn.apply(
        x_TD.detach(), tuple(scales[i] for i in chosen), *(outputs[i] for i in chosen), *(As[i] for i in chosen),
        *(Bs[i] for i in chosen),
    )  # fmt: skip
    learned = list(outputs)
    for i, result in zip(chosen, results, strict=True):
        learned[i] = result
    return tuple(learned)
