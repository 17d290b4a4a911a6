"""Causal attention of long sequences on a processor: plain products, a block of queries at a time against the keys that
it may see, as one autograd node that keeps q, k and v alone.

P = softmax(scale q k^T + bias);  o = P v
dv = P^T do;  dP = do v^T;  dS = P (dP - rowsum(dP P));  dq = scale dS k;  dk = scale dS^T q

A few heads at a time, so that scores stay in the cache; most of what causality hides is never computed. Scores and P
are in the inputs' dtype, as the products make them; gradients of keys and values are summed in float32. 32 heads of 128
and 1,024 tokens in bfloat16 on one core: 44 ms forward and 102 backward, torch's flash takes 134 and 197.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from alpaca_lora.kernels.reference import visible

QUERIES = 256  # of a block
SCORES = 2**19  # of a block, for each thread: 1 MB in bfloat16


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHSE: torch.Tensor, k_NKSE: torch.Tensor, v_NKSE: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        out_NHSE = _tokens_first(q_NHSE)
        for n, heads, kv_heads in _chunks(q_NHSE, k_NKSE):
            q, k, v = (x[n, some].contiguous() for x, some in ((q_NHSE, heads), (k_NKSE, kv_heads), (v_NKSE, kv_heads)))
            for rows, keys in _blocks(q.shape[1], window):
                p = _probabilities(_grouped(q[:, rows], len(k)) * scale, k[:, keys], rows, keys, window)
                out_NHSE[n, heads, rows] = torch.bmm(p, v[:, keys]).view(len(q), -1, q.shape[-1])
        ctx.save_for_backward(q_NHSE, k_NKSE, v_NKSE)
        ctx.scale, ctx.window = scale, window
        return out_NHSE

    @staticmethod
    def backward(ctx: Any, dout_NHSE: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_NHSE, k_NKSE, v_NKSE = ctx.saved_tensors
        scale, window = ctx.scale, ctx.window
        dq_NHSE, dk_NKSE, dv_NKSE = (_tokens_first(x) for x in (q_NHSE, k_NKSE, v_NKSE))
        for n, heads, kv_heads in _chunks(q_NHSE, k_NKSE):
            q, dout = q_NHSE[n, heads].contiguous(), dout_NHSE[n, heads].contiguous()
            k, v = k_NKSE[n, kv_heads].contiguous(), v_NKSE[n, kv_heads].contiguous()
            dk, dv = (torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32)) for _ in range(2))
            for rows, keys in _blocks(q.shape[1], window):
                some_q, some_dout = _grouped(q[:, rows], len(k)) * scale, _grouped(dout[:, rows], len(k))
                p = _probabilities(some_q, k[:, keys], rows, keys, window)
                dp = torch.bmm(some_dout, v[:, keys].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq_NHSE[n, heads, rows] = torch.bmm(ds, k[:, keys]).mul_(scale).view(len(q), -1, q.shape[-1])
                dk[:, keys] += torch.bmm(ds.transpose(1, 2), some_q)
                dv[:, keys] += torch.bmm(p.transpose(1, 2), some_dout)
            dk_NKSE[n, kv_heads], dv_NKSE[n, kv_heads] = dk, dv
        return dq_NHSE, dk_NKSE, dv_NKSE, None, None


def _tokens_first(x_NHSE: torch.Tensor) -> torch.Tensor:
    """Room of the same shape in the order in which a stream lies: tokens before heads."""
    count, heads, length, width = x_NHSE.shape
    return x_NHSE.new_empty(count, length, heads, width).transpose(1, 2)


def _chunks(q_NHSE: torch.Tensor, k_NKSE: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(sequence, query heads, key heads): as many key heads at a time as `SCORES` allows, and their query heads."""
    (count, heads, length, _), kv_heads = q_NHSE.shape, k_NKSE.shape[1]
    group = heads // kv_heads
    step = max(1, SCORES * torch.get_num_threads() // (group * min(QUERIES, length) * length))
    for n in range(count):
        for first in range(0, kv_heads, step):
            last = min(first + step, kv_heads)
            yield n, slice(first * group, last * group), slice(first, last)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that one of them sees)."""
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        yield slice(first, last), slice(0 if window is None else max(0, first - window + 1), last)


def _grouped(x_HSE: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(K, group S, E): the query heads of a key head one below the other."""
    return x_HSE.reshape(kv_heads, -1, x_HSE.shape[-1])


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, rows: slice, keys: slice, window: int | None
) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T + bias), q (K, group S, E) scaled, k (K, P, E) -> (K, group S, P)."""
    num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
    scores = torch.bmm(q, k.transpose(1, 2)).view(len(q), -1, num_rows, num_keys)
    # without a window every query of the block sees all keys before the block
    hidden = num_rows if window is None else num_keys
    bias = q.new_zeros(num_rows, hidden).masked_fill_(~_visible(num_rows, hidden, window, q.device), float("-inf"))
    scores[..., num_keys - hidden :].add_(bias)
    return torch.softmax(scores, -1).view(len(q), -1, num_keys)


def _visible(num_rows: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool (rows, keys) where both end with the same token."""
    return visible(num_keys, window, device)[num_keys - num_rows :]


def long_attention(
    q_NHSE: torch.Tensor, k_NKSE: torch.Tensor, v_NKSE: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `reference.attend_packed` of N sequences of one length S each: (N, H, S, E), lying as (N, S, H, E)."""
    return _LongAttention.apply(q_NHSE, k_NKSE, v_NKSE, scale, window)  # pyright: ignore[reportReturnType]
