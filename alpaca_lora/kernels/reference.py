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
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(q k^T scale) v in each segment on its own: t sees s with s <= t, and t - s < window where there is one.

    Softmax in float32. Query head h reads key/value head h // (H / K). ``prefix``: keys and values (P, K, E) that stand
    in front of every segment, at positions 0 to P - 1; its own tokens follow from P on (Li and Liang 2021).
    """
    group = q_THE.shape[1] // k_TKE.shape[1]
    outs = []
    for q, k, v in zip(
        q_THE.split(tuple(lengths)), k_TKE.split(tuple(lengths)), v_TKE.split(tuple(lengths)), strict=True
    ):
        if prefix is not None:
            k, v = torch.cat((prefix[0], k)), torch.cat((prefix[1], v))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_HST = torch.einsum("she,the->hst", q, k).float() * scale
        scores_HST = scores_HST.masked_fill(~visible(len(q), window, q.device, len(k) - len(q)), float("-inf"))
        outs.append(torch.einsum("hst,the->she", scores_HST.softmax(-1).to(v.dtype), v))
    return torch.cat(outs)


def visible(length: int, window: int | None, device: torch.device, num_before: int = 0) -> torch.Tensor:
    """(length, num_before + length) bool: may row t see column s of its own segment, `num_before` columns before it."""
    place = torch.arange(num_before + length, device=device)
    ahead = place[num_before:, None] - place[None, :]
    return (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)


def paged_attention(
    q_BHE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`attend_packed` of one token of each sequence behind its past: (B, H, E).

    keys, values: a pool (num_blocks, block, K, E). Sequence b has ``lengths[b]`` places, its new token's the last;
    place s is row s % block of block ``tables[b, s // block]`` (Kwon et al. 2023, section 4.3).
    """
    outs = []
    for q_HE, table, length in zip(q_BHE, tables.tolist(), lengths.tolist(), strict=True):
        used = table[: -(-length // keys.shape[1])]
        k, v = (pool[used].flatten(0, 1)[:length] for pool in (keys, values))
        outs.append(attend_packed(q_HE[None], k[-1:], v[-1:], [1], scale, window, (k[:-1], v[:-1])))
    return torch.cat(outs)


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
    constants: Sequence[tuple[torch.Tensor, torch.Tensor] | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """output_i + scale_i * drop(x) A_i^T B_i^T for linears that share the input x (Hu et al. 2021, equation 3).

    outputs_i (T, out_i) are the base linears' results; A_i (R, D), B_i (out_i, R) are float32 masters, rounded to x's
    dtype for the product; None leaves output i as it is. One dropout mask for the shared input. constants_i: a second
    pair (A0_i, B0_i) that is added in the same way, and gets no gradient.
    """
    dropped = x_TD
    if dropout is not None and dropout.p > 0:
        dropped = x_TD * keep_mask(dropout, x_TD.shape[1]).to(x_TD.dtype) / (1 - dropout.p)
    added = []
    for output, a, b, scale, pair in zip(outputs, As, Bs, scales, constants or [None] * len(As), strict=True):
        if a is None or b is None:
            added.append(output)
            continue
        if pair is not None:
            a, b = torch.cat((a, pair[0].detach())), torch.cat((b, pair[1].detach()), dim=1)
        delta = (dropped @ a.to(x_TD.dtype).t()) @ b.to(x_TD.dtype).t()
        added.append(output + scale * delta)
    return tuple(added)


def lora_learn(
    outputs: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
) -> tuple[torch.Tensor, ...]:
    """The outputs as they are; A and B get the gradient that they have in `lora_add`, x gets none here.

    Straight-through (Bengio et al. 2013): the outputs come from a weight that holds the update already, rounded.
    """
    updates = lora_add([torch.zeros_like(output) for output in outputs], x_TD.detach(), As, Bs, scales)
    return tuple(output + (update - update.detach()) for output, update in zip(outputs, updates, strict=True))


def scale_columns(
    z_TO: torch.Tensor, m_O: torch.Tensor, inverse_norm_O: torch.Tensor | None, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """g (z - b) + b with g = m inverse_norm: each column around its bias, in float32 inside, in z's dtype outside.

    DoRA's magnitude over norm (Liu et al. 2024, equation 5, the norm a constant as in section 4.3) and IA3's vectors
    (Liu et al. 2022, section 3.3). m_O is a float32 master; inverse_norm_O None is 1 and gets no gradient; bias_O None
    is 0 and gets none.
    """
    factor_O = m_O.float() if inverse_norm_O is None else m_O.float() * inverse_norm_O.detach()
    center_O = 0.0 if bias_O is None else bias_O.detach().float()
    return (factor_O * (z_TO.float() - center_O) + center_O).to(z_TO.dtype)


def scale_learn(y_TO: torch.Tensor, m_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """y as it is, where y - b is a multiple of m already: m gets sum_T dy (y - b) / m in float32, 0 where m is 0."""
    center_O = 0.0 if bias_O is None else bias_O.detach().float()
    unit_TO = torch.where(m_O != 0, (y_TO.detach().float() - center_O) / m_O.detach(), 0.0)
    scaled_TO = m_O * unit_TO
    return y_TO + (scaled_TO - scaled_TO.detach()).to(y_TO.dtype)


def weight_learn(y_TO: torch.Tensor, x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """y (T, out) as it is; W (out, in) gets the gradient dY^T X of x W^T, x gets none here (straight-through)."""
    product_TO = F.linear(x_TI.detach(), weight_OI)
    return y_TO + (product_TO - product_TO.detach()).to(y_TO.dtype)


def tiled_linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T (T, out) in x's dtype, W (out, in) a constant: what a quantized linear computes, however W is stored."""
    return x_TI @ weight_OI.detach().to(x_TI.dtype).t()


def decode_four_bit(
    codes_OI: torch.Tensor, table: torch.Tensor, scales_OI: torch.Tensor, zeros_OI: torch.Tensor | None
) -> torch.Tensor:
    """(table[code] - zero) scale in float32; codes, scales and zero points stand beside each weight (out, in)."""
    values_OI = table[codes_OI.long()]
    return (values_OI if zeros_OI is None else values_OI - zeros_OI) * scales_OI


def integer_linear(
    x_TI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """Activations rounded to 8 bits, by each token's largest magnitude or by one ``scale`` (1,), times 8-bit weights
    codes * scales_O; the products exact, in x's dtype outside. The gradient passes the rounding by (straight-through).
    """
    wide_TI = x_TI.float()
    if scale is None:
        scale = wide_TI.detach().abs().amax(1, keepdim=True).div(127).clamp_min(torch.finfo(torch.float32).tiny)
    rounded_TI = (wide_TI.detach() * scale.reciprocal()).round().clamp(-127, 127)
    product_TO = (rounded_TI.double() @ codes_OI.double().t()).float() * scales_O * scale
    through_TO = x_TI @ (codes_OI.float() * scales_O[:, None]).to(x_TI.dtype).t()
    return product_TO.to(x_TI.dtype) + through_TO - through_TO.detach()
