"""Head and cross-entropy over labelled rows, in chunks, with the gradient made in the forward pass.

The full logits (N, V) never exist: a chunk's logits become its probabilities become its gradient in one buffer.
With p = softmax(h W^T): dh = (p - onehot) W / num_supervised, dW = (p - onehot)^T h / num_supervised if W is trained.
"""

from __future__ import annotations

from typing import Any

import torch

# 50 MB of float32 at V = 49152. Products of 128 rows with the head reach 330 and 282 GFLOP/s (forward, backward), 256
# rows 348 and 333, of 384 rows 386 and 374
CHUNK_ROWS = 256


def _probabilities(logits_MV: torch.Tensor, target_M1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn float32 logits into softmax in place; returns them and the sum of -log p[target]."""
    picked_M1 = logits_MV.gather(1, target_M1)
    peak_M1 = logits_MV.amax(1, keepdim=True)
    p_MV = torch.softmax(logits_MV, 1, out=logits_MV)
    peak_p_M1 = p_MV.amax(1, keepdim=True)  # 1 / mass: the log-sum-exp without another pass of exponentials
    return p_MV, (peak_M1 - peak_p_M1.log() - picked_M1).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        target_N: torch.Tensor,
        divisor: int,
        softcap: float | None,
    ) -> torch.Tensor:
        rows_needed = min(CHUNK_ROWS, len(target_N))
        shape = (rows_needed, weight_VD.shape[0])
        raw_MV = hidden_ND.new_empty(shape)
        wide_MV = raw_MV if raw_MV.dtype == torch.float32 else raw_MV.new_empty(shape, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(target_N), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            h_MD, target_M1 = hidden_ND[rows], target_N[rows, None]
            grad_MV, logits_MV = raw_MV[: len(h_MD)], wide_MV[: len(h_MD)]
            torch.mm(h_MD, weight_VD.t(), out=grad_MV)
            if grad_MV.dtype != torch.float32:
                logits_MV.copy_(grad_MV)
            slope_MV = None
            if softcap is not None:
                logits_MV.div_(softcap).tanh_()
                slope_MV = 1 - logits_MV.square()  # d softcap tanh(z / softcap) / dz
                logits_MV.mul_(softcap)
            if dhidden_ND is None and dweight_VD is None:
                total += (torch.logsumexp(logits_MV, 1, keepdim=True) - logits_MV.gather(1, target_M1)).sum()
                continue
            p_MV, loss = _probabilities(logits_MV, target_M1)
            total += loss
            p_MV.scatter_add_(1, target_M1, torch.full_like(target_M1, -1, dtype=p_MV.dtype))
            if slope_MV is not None:
                p_MV.mul_(slope_MV)
            grad_MV.copy_(p_MV)
            # divided after the product: N x D numbers, not N x V
            if dhidden_ND is not None:
                torch.mm(grad_MV, weight_VD, out=dhidden_ND[rows]).div_(divisor)
            if dweight_VD is not None:
                dweight_VD += (grad_MV.t() @ h_MD).float().div_(divisor)
        ctx.grads = dhidden_ND, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dhidden_ND, dweight_VD = ctx.grads
        ctx.grads = None, None
        return (
            None if dhidden_ND is None else dhidden_ND.mul_(scale.to(dhidden_ND.dtype)),
            None if dweight_VD is None else dweight_VD.mul_(scale.to(dweight_VD.dtype)),
            None, None, None,
        )  # fmt: skip


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    num_supervised: int,
    softcap: float | None = None,
) -> torch.Tensor:
    """As `reference.linear_cross_entropy`. The gradient lives from forward to backward once: no second backward."""
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, max(num_supervised, 1), softcap)  # pyright: ignore[reportReturnType]
