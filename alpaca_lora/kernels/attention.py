"""Causal attention inside the segments of a packed stream.

Segments of similar length are laid side by side in a small padded block (`SegmentLayout`), so a stream of twenty short
rows is a few large products and not twenty small ones. Two ways to attend in a block:

* short segments on a processor: plain products with the gradient written out; keeps q, k and v.
* everything else: torch's scaled_dot_product_attention, causal. Padding stands behind the segment, no real row sees it.

P = softmax(scale q k^T + bias);  o = P v
dv = P^T do;  dP = do v^T;  dS = P (dP - rowsum(dP P));  dq = scale dS k;  dk = scale dS^T q
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.reference import visible

# tokens; 2048 of them forward and backward in segments of 128: 25 ms against flash's 34, of 256: 47 against 43
LONGEST_PLAIN = 192
WASTE = 0.15  # a block is padded to its longest segment; shorter ones join it while they lose at most this share


class Block(NamedTuple):
    """`count` segments padded to `length`; `rows` are their tokens in the stream, `slots` their places in the block."""

    count: int
    length: int
    rows: torch.Tensor
    slots: torch.Tensor


class SegmentLayout:
    """Which segments share a block: made once per batch, used by every layer."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        for i in order:
            if groups and self.lengths[i] >= (1 - WASTE) * self.lengths[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        self.blocks = tuple(self._block(group, starts, device) for group in groups)

    def _block(self, group: list[int], starts: list[int], device: torch.device | str) -> Block:
        longest = self.lengths[group[0]]
        rows = torch.cat([torch.arange(starts[i], starts[i] + self.lengths[i]) for i in group])
        slots = torch.cat([torch.arange(self.lengths[i]) + place * longest for place, i in enumerate(group)])
        return Block(len(group), longest, rows.to(device), slots.to(device))


def _gather(x_THE: torch.Tensor, block: Block, kv_heads: int) -> torch.Tensor:
    """The block's tokens as (count, K, heads per kv head, length, E), zeros where there is no token."""
    heads, width = x_THE.shape[1:]
    if len(block.rows) == block.count * block.length:
        padded = x_THE.index_select(0, block.rows)
    else:
        padded = x_THE.new_zeros(block.count * block.length, heads, width)
        padded.index_copy_(0, block.slots, x_THE.index_select(0, block.rows))
    padded = padded.view(block.count, block.length, kv_heads, heads // kv_heads, width)
    return padded.permute(0, 2, 3, 1, 4)


def _scatter(block_out: torch.Tensor, block: Block, out_THE: torch.Tensor) -> None:
    """Write (count, K, group, length, E) back to the tokens' places in the stream."""
    count, kv_heads, group, length, width = block_out.shape
    flat = block_out.permute(0, 3, 1, 2, 4).reshape(count * length, kv_heads * group, width)
    if len(block.rows) != count * length:
        flat = flat.index_select(0, block.slots)
    out_THE.index_copy_(0, block.rows, flat)


def _bias(block: Block, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(S, S): 0 where a row may look, -inf elsewhere. Adding it takes half the time of filling by a mask."""
    bias = like.new_zeros(block.length, block.length)
    return bias.masked_fill_(~visible(block.length, window, like.device), float("-inf"))


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T + bias): q (count K, group S, E) scaled already, k (count K, S, E) -> (count K, group S, S).

    In the inputs' dtype: torch's softmax keeps float32 inside a row, so only the scores are rounded, as the product
    that made them does.
    """
    length = k.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2)).view(q.shape[0], -1, length, length)
    return torch.softmax(scores.add_(bias), -1).view(q.shape[0], -1, length)


class _PlainBlocks(torch.autograd.Function):
    """Attention of all short blocks of a stream by plain products."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor,
        blocks: tuple[Block, ...], scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        kv_heads, width = k_TKE.shape[1:]
        out_THE = torch.zeros_like(q_THE)
        for block in blocks:
            n = block.count * kv_heads
            q = _gather(q_THE, block, kv_heads).reshape(n, -1, width) * scale
            k = _gather(k_TKE, block, kv_heads).reshape(n, block.length, width)
            v = _gather(v_TKE, block, kv_heads).reshape(n, block.length, width)
            p = _probabilities(q, k, _bias(block, window, q))
            _scatter(torch.bmm(p, v).view(block.count, kv_heads, -1, block.length, width), block, out_THE)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE)
        ctx.blocks, ctx.scale, ctx.window = blocks, scale, window
        return out_THE

    @staticmethod
    def backward(ctx: Any, dout_THE: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_THE, k_TKE, v_TKE = ctx.saved_tensors
        kv_heads, width = k_TKE.shape[1:]
        dq_THE, dk_TKE, dv_TKE = torch.zeros_like(q_THE), torch.zeros_like(k_TKE), torch.zeros_like(v_TKE)
        for block in ctx.blocks:
            n, length = block.count * kv_heads, block.length
            q = _gather(q_THE, block, kv_heads).reshape(n, -1, width) * ctx.scale
            k = _gather(k_TKE, block, kv_heads).reshape(n, length, width)
            v = _gather(v_TKE, block, kv_heads).reshape(n, length, width)
            dout = _gather(dout_THE, block, kv_heads).reshape(n, -1, width)
            p = _probabilities(q, k, _bias(block, ctx.window, q))
            dp = torch.bmm(dout, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            shape = (block.count, kv_heads, -1, length, width)
            _scatter(torch.bmm(p.transpose(1, 2), dout).view(shape), block, dv_TKE)
            _scatter(torch.bmm(ds.transpose(1, 2), q).view(shape), block, dk_TKE)
            _scatter(torch.bmm(ds, k).mul_(ctx.scale).view(shape), block, dq_THE)
        return dq_THE, dk_TKE, dv_TKE, None, None, None


def _flash(q_NHSE: torch.Tensor, k_NKSE: torch.Tensor, v_NKSE: torch.Tensor, scale: float, window: int | None):
    """torch's attention for N sequences of one length S, causal -> (N, H, S, E)."""
    length = q_NHSE.shape[2]
    mask = None if window is None or window >= length else visible(length, window, q_NHSE.device)
    grouped = q_NHSE.shape[1] != k_NKSE.shape[1]
    return F.scaled_dot_product_attention(
        q_NHSE, k_NKSE, v_NKSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _flash_block(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, block: Block, scale: float, window: int | None
) -> torch.Tensor:
    """One block through `_flash`; the block's tokens in the order of its rows, (rows of the block, H, E)."""
    heads, width = q_THE.shape[1:]
    q, k, v = (
        _gather(x, block, k_TKE.shape[1]).reshape(block.count, x.shape[1], block.length, width)
        for x in (q_THE, k_TKE, v_TKE)
    )
    out = _flash(q, k, v, scale, window)
    return out.transpose(1, 2).reshape(block.count * block.length, heads, width).index_select(0, block.slots)


def attend_packed(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    lengths: Sequence[int] | SegmentLayout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As `reference.attend_packed`; give the `SegmentLayout` of the lengths where several layers share it."""
    layout = lengths if isinstance(lengths, SegmentLayout) else SegmentLayout(lengths, q_THE.device)
    plain = tuple(b for b in layout.blocks if b.length <= LONGEST_PLAIN) if q_THE.device.type == "cpu" else ()
    if len(plain) == len(layout.blocks):
        return _PlainBlocks.apply(q_THE, k_TKE, v_TKE, plain, scale, window)  # pyright: ignore[reportReturnType]
    if len(layout.lengths) == 1:  # nothing to gather
        q_1HTE, k_1KTE, v_1KTE = (x.transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TKE, v_TKE))
        out_1HTE = _flash(q_1HTE, k_1KTE, v_1KTE, scale, window)
        return out_1HTE.squeeze(0).transpose(0, 1)
    flash = [b for b in layout.blocks if b not in plain]
    pieces = [_flash_block(q_THE, k_TKE, v_TKE, block, scale, window) for block in flash]
    rows = torch.cat([block.rows for block in flash])
    if not plain:
        return torch.cat(pieces).index_select(0, torch.argsort(rows))
    out_THE = _PlainBlocks.apply(q_THE, k_TKE, v_TKE, plain, scale, window)
    return torch.index_copy(out_THE, 0, rows, torch.cat(pieces))  # pyright: ignore[reportArgumentType]
