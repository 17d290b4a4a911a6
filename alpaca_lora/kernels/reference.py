"""Each op in plain torch: what it means. Slow, differentiable by autograd, and the oracle of every fast path.

Shape letters: T tokens, D model width, H query heads, K key/value heads, E head width, F feed-forward width,
V vocabulary, R rank, N labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.dropout import DropoutKey, keep_mask

Activation = Literal["silu", "gelu_tanh"]


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), in float32 inside (Zhang and Sennrich 2019; Gemma has offset 1).

    With offset 0 the normalised value is rounded to x's dtype before the weight, as Llama does.
    """
    normal = x_TD.float() * torch.rsqrt(x_TD.float().pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normal * (offset + weight_D.float())).to(x_TD.dtype)
    return weight_D * normal.to(x_TD.dtype)


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout: x cos + (-x2, x1) sin."""
    half = x_THE.shape[-1] // 2
    turned = torch.cat((-x_THE[..., half:], x_THE[..., :half]), dim=-1)
    return x_THE * cos_TE[:, None, :] + turned * sin_TE[:, None, :]


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """act(gate) * up: SwiGLU or GeGLU (Shazeer 2020)."""
    act = F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")
    return act * up_TF


def attend_packed(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T scale) v in each segment on its own: t sees s with s <= t, and t - s < window where there is one.

    Softmax in float32. Query head h reads key/value head h // (H / K).
    """
    group = q_THE.shape[1] // k_TKE.shape[1]
    outs = []
    for q, k, v in zip(
        q_THE.split(tuple(lengths)), k_TKE.split(tuple(lengths)), v_TKE.split(tuple(lengths)), strict=True
    ):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_HST = torch.einsum("she,the->hst", q, k).float() * scale
        scores_HST = scores_HST.masked_fill(~visible(len(q), window, q.device), float("-inf"))
        outs.append(torch.einsum("hst,the->she", scores_HST.softmax(-1).to(v.dtype), v))
    return torch.cat(outs)


def visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) bool: may row t see column s of its own segment."""
    ahead = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    num_supervised: int,
    softcap: float | None = None,
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden weight^T)[target], divided by `num_supervised`; a float32 scalar."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return F.cross_entropy(logits_NV, target_N, reduction="sum") / max(num_supervised, 1)


def lora_add(
    outputs: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    dropout: DropoutKey | None = None,
) -> tuple[torch.Tensor, ...]:
    """output_i + scale_i * drop(x) A_i^T B_i^T for linears that share the input x (Hu et al. 2021, equation 3).

    outputs_i (T, out_i) are the base linears' results; A_i (R, D), B_i (out_i, R) are float32 masters, rounded to x's
    dtype for the product; None leaves output i as it is. One dropout mask for the shared input.
    """
    dropped = x_TD
    if dropout is not None and dropout.p > 0:
        dropped = x_TD * keep_mask(dropout, x_TD.shape[1]).to(x_TD.dtype) / (1 - dropout.p)
    added = []
    for output, a, b, scale in zip(outputs, As, Bs, scales, strict=True):
        if a is None or b is None:
            added.append(output)
            continue
        delta = (dropped @ a.to(x_TD.dtype).t()) @ b.to(x_TD.dtype).t()
        added.append(output + scale * delta)
    return tuple(added)
