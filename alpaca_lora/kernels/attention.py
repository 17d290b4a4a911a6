"""Causal attention inside the segments of a packed stream.

Segments of similar length are laid side by side in a small padded block (`SegmentLayout`), so a stream of twenty short
rows is a few large products and not twenty small ones. Two ways to attend in a block:

* short segments on a processor: plain products with the gradient written out; keeps q, k and v.
* longer ones there: the same, a block of queries at a time (long_attention.py).
* everything else: torch's scaled_dot_product_attention, causal. Padding stands behind the segment, no real row sees it.

P = softmax(scale q k^T + bias);  o = P v
dv = P^T do;  dP = do v^T;  dS = P (dP - rowsum(dP P));  dq = scale dS k;  dk = scale dS^T q

A prefix of keys and values that every token sees stands in front of each segment's own: in the same products where a
segment is short; where it is long, beside the flash of the segment itself, joined by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.long_attention import long_attention
from alpaca_lora.kernels.reference import visible

# tokens; 2048 of them forward and backward in segments of 128: 25 ms against flash's 34, of 256: 47 against 43
LONGEST_PLAIN = 192
# A block is padded to its longest segment; shorter ones join it while they lose at most this share of it, or so few
# tokens that the products of the padding cost less than the operations of a block of their own: 32 sentences of 7 to 52
# tokens forward and backward took 139 ms in nine blocks and 56 in one, 16 rows of 20 to 211 tokens 211 ms in eight and
# 133 in three.
WASTE = 0.15
SLACK = 64


KeysValues = tuple[torch.Tensor, torch.Tensor]  # of a prefix, (P, K, E) each: every token of every segment sees them


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
            longest = self.lengths[groups[-1][0]] if groups else 0
            if groups and longest - self.lengths[i] <= max(WASTE * longest, SLACK):
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


def _gather_keys(x_TKE: torch.Tensor, prefix_PKE: torch.Tensor | None, block: Block) -> torch.Tensor:
    """The block's keys or values behind the prefix, (count K, P + S, E)."""
    kv_heads, width = x_TKE.shape[1:]
    own = _gather(x_TKE, block, kv_heads)
    if prefix_PKE is None:
        return own.reshape(-1, block.length, width)
    prefix = prefix_PKE.transpose(0, 1).expand(block.count, -1, -1, -1)
    return torch.cat((prefix, own.squeeze(2)), 2).flatten(0, 1)


def _bias(block: Block, window: int | None, num_before: int, like: torch.Tensor) -> torch.Tensor:
    """(S, P + S): 0 where a row may look, -inf elsewhere. Adding it takes half the time of filling by a mask."""
    bias = like.new_zeros(block.length, num_before + block.length)
    return bias.masked_fill_(~visible(block.length, window, like.device, num_before), float("-inf"))


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T + bias): q (count K, group S, E) scaled, k (count K, P + S, E) -> (count K, group S, P + S).

    In the inputs' dtype: torch's softmax keeps float32 inside a row, so only the scores are rounded, as the product
    that made them does.
    """
    scores = torch.bmm(q, k.transpose(1, 2)).view(q.shape[0], -1, *bias.shape)
    return torch.softmax(scores.add_(bias), -1).view(q.shape[0], -1, k.shape[1])


class _PlainBlocks(torch.autograd.Function):
    """Attention of all short blocks of a stream by plain products."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor,
        prefix_k: torch.Tensor | None, prefix_v: torch.Tensor | None,
        blocks: tuple[Block, ...], scale: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        kv_heads, width = k_TKE.shape[1:]
        num_before = 0 if prefix_k is None else len(prefix_k)
        out_THE = torch.zeros_like(q_THE)
        for block in blocks:
            q = _gather(q_THE, block, kv_heads).reshape(block.count * kv_heads, -1, width) * scale
            k, v = _gather_keys(k_TKE, prefix_k, block), _gather_keys(v_TKE, prefix_v, block)
            p = _probabilities(q, k, _bias(block, window, num_before, q))
            _scatter(torch.bmm(p, v).view(block.count, kv_heads, -1, block.length, width), block, out_THE)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, prefix_k, prefix_v)
        ctx.blocks, ctx.scale, ctx.window = blocks, scale, window
        return out_THE

    @staticmethod
    def backward(ctx: Any, dout_THE: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_THE, k_TKE, v_TKE, prefix_k, prefix_v = ctx.saved_tensors
        kv_heads, width = k_TKE.shape[1:]
        num_before = 0 if prefix_k is None else len(prefix_k)
        dq_THE, dk_TKE, dv_TKE = torch.zeros_like(q_THE), torch.zeros_like(k_TKE), torch.zeros_like(v_TKE)
        # summed over segments, so in float32
        dprefix_k, dprefix_v = (q_THE.new_zeros(kv_heads, num_before, width, dtype=torch.float32) for _ in range(2))
        for block in ctx.blocks:
            n, length = block.count * kv_heads, block.length
            q = _gather(q_THE, block, kv_heads).reshape(n, -1, width) * ctx.scale
            k, v = _gather_keys(k_TKE, prefix_k, block), _gather_keys(v_TKE, prefix_v, block)
            dout = _gather(dout_THE, block, kv_heads).reshape(n, -1, width)
            p = _probabilities(q, k, _bias(block, ctx.window, num_before, q))
            dp = torch.bmm(dout, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq = torch.bmm(ds, k).mul_(ctx.scale).view(block.count, kv_heads, -1, length, width)
            _scatter(dq, block, dq_THE)
            dkeys = torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), dout)
            for dx, dx_TKE, dprefix in zip(dkeys, (dk_TKE, dv_TKE), (dprefix_k, dprefix_v), strict=True):
                dx = dx.view(block.count, kv_heads, 1, num_before + length, width)
                _scatter(dx[..., num_before:, :], block, dx_TKE)
                if num_before:
                    dprefix += dx[:, :, 0, :num_before].sum(0, dtype=torch.float32)
        grads = (dq_THE, dk_TKE, dv_TKE)
        if prefix_k is None:
            return *grads, None, None, None, None, None
        dprefix_k, dprefix_v = (dx.transpose(0, 1).to(q_THE.dtype) for dx in (dprefix_k, dprefix_v))
        return *grads, dprefix_k, dprefix_v, None, None, None


class _FlashBehindPrefix(torch.autograd.Function):
    """Long sequences of one length, causal, behind a prefix: torch's flash kernel for their own keys, plain products
    for the prefix. With a mask the upper triangle is computed too: 1.3 times the time at 1024 tokens, 1.8 at 2048.

    lse = log(exp(lse_own) + exp(lse_prefix));  o = o_own exp(lse_own - lse) + exp(s_prefix - lse) v_prefix
    Backward: the kernel rebuilds P as exp(s - lse) and takes rowsum(do o), so given the joint o and lse its gradients
    are those of the joint softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHSE: torch.Tensor, k_NKSE: torch.Tensor, v_NKSE: torch.Tensor,
        prefix_k: torch.Tensor, prefix_v: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        own, own_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_NHSE, k_NKSE, v_NKSE, 0.0, True, scale=scale
        )
        scores = _scores_of_prefix(q_NHSE, prefix_k, scale)
        lse = torch.logaddexp(own_lse, scores.logsumexp(-1).view(own_lse.shape))
        p = torch.exp(scores - lse.reshape(*scores.shape[:-1], 1)).to(q_NHSE.dtype)
        out = torch.matmul(p, prefix_v.transpose(0, 1)).view(q_NHSE.shape)
        out = torch.addcmul(out, own, torch.exp(own_lse - lse)[..., None].to(own.dtype))
        ctx.save_for_backward(q_NHSE, k_NKSE, v_NKSE, prefix_k, prefix_v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout_NHSE: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_NHSE, q, k, v, out, lse, 0.0, True, scale=ctx.scale
        )
        scores = _scores_of_prefix(q, prefix_k, ctx.scale)
        rows = scores.shape[:-1]
        p = torch.exp(scores - lse.reshape(*rows, 1))
        delta = (dout_NHSE * out).sum(-1, dtype=torch.float32).reshape(*rows, 1)
        dout = dout_NHSE.reshape(*rows, -1)
        dp = torch.matmul(dout, prefix_v.permute(1, 2, 0))
        ds = (p * (dp - delta)).mul_(ctx.scale).to(q.dtype)
        dq = dq + torch.matmul(ds, prefix_k.transpose(0, 1)).view(q.shape)
        dprefix_k = torch.einsum("nksp,nkse->pke", ds, q.reshape(*rows, -1))
        dprefix_v = torch.einsum("nksp,nkse->pke", p.to(q.dtype), dout)
        return dq, dk, dv, dprefix_k, dprefix_v, None


def _scores_of_prefix(q_NHSE: torch.Tensor, prefix_PKE: torch.Tensor, scale: float) -> torch.Tensor:
    """scale q k^T in float32, (N, K, group S, P)."""
    count, kv_heads = len(q_NHSE), prefix_PKE.shape[1]
    q = q_NHSE.reshape(count, kv_heads, -1, q_NHSE.shape[-1])
    return torch.matmul(q, prefix_PKE.permute(1, 2, 0)).float().mul_(scale)


def _flash(
    q_NHSE: torch.Tensor, k_NKSE: torch.Tensor, v_NKSE: torch.Tensor, scale: float, window: int | None,
    prefix: KeysValues | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of N sequences of one length S, causal, behind the prefix -> (N, H, S, E)."""
    if q_NHSE.device.type == "cpu" and prefix is None:
        return long_attention(q_NHSE, k_NKSE, v_NKSE, scale, window)
    length = q_NHSE.shape[2]
    num_before = 0 if prefix is None else len(prefix[0])
    windowed = window is not None and window < num_before + length
    if prefix is not None:
        if q_NHSE.device.type == "cpu" and not windowed:
            return _FlashBehindPrefix.apply(q_NHSE, k_NKSE, v_NKSE, *prefix, scale)  # pyright: ignore[reportReturnType]
        k_NKSE, v_NKSE = (
            torch.cat((one.transpose(0, 1).expand(len(x), -1, -1, -1), x), 2)
            for one, x in zip(prefix, (k_NKSE, v_NKSE), strict=True)
        )
    mask = visible(length, window, q_NHSE.device, num_before) if windowed or num_before else None
    grouped = q_NHSE.shape[1] != k_NKSE.shape[1]
    return F.scaled_dot_product_attention(
        q_NHSE, k_NKSE, v_NKSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _flash_block(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, block: Block, scale: float, window: int | None,
    prefix: KeysValues | None,
) -> torch.Tensor:  # fmt: skip
    """One block through `_flash`; the block's tokens in the order of its rows, (rows of the block, H, E)."""
    heads, width = q_THE.shape[1:]
    q, k, v = (
        _gather(x, block, k_TKE.shape[1]).reshape(block.count, x.shape[1], block.length, width)
        for x in (q_THE, k_TKE, v_TKE)
    )
    out = _flash(q, k, v, scale, window, prefix)
    return out.transpose(1, 2).reshape(block.count * block.length, heads, width).index_select(0, block.slots)


def attend_packed(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    lengths: Sequence[int] | SegmentLayout,
    scale: float,
    window: int | None = None,
    prefix: KeysValues | None = None,
) -> torch.Tensor:
    """As `reference.attend_packed`; give the `SegmentLayout` of the lengths where several layers share it."""
    layout = lengths if isinstance(lengths, SegmentLayout) else SegmentLayout(lengths, q_THE.device)
    plain = tuple(b for b in layout.blocks if b.length <= LONGEST_PLAIN) if q_THE.device.type == "cpu" else ()
    if len(plain) == len(layout.blocks):
        return _plain_blocks(q_THE, k_TKE, v_TKE, prefix, plain, scale, window)
    if len(layout.lengths) == 1:  # nothing to gather
        q_1HTE, k_1KTE, v_1KTE = (x.transpose(0, 1).unsqueeze(0) for x in (q_THE, k_TKE, v_TKE))
        out_1HTE = _flash(q_1HTE, k_1KTE, v_1KTE, scale, window, prefix)
        return out_1HTE.squeeze(0).transpose(0, 1)
    flash = [b for b in layout.blocks if b not in plain]
    pieces = [_flash_block(q_THE, k_TKE, v_TKE, block, scale, window, prefix) for block in flash]
    rows = torch.cat([block.rows for block in flash])
    if not plain:
        return torch.cat(pieces).index_select(0, torch.argsort(rows))
    out_THE = _plain_blocks(q_THE, k_TKE, v_TKE, prefix, plain, scale, window)
    return torch.index_copy(out_THE, 0, rows, torch.cat(pieces))


def _plain_blocks(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, prefix: KeysValues | None, blocks: tuple[Block, ...],
    scale: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    return _PlainBlocks.apply(q_THE, k_TKE, v_TKE, *(prefix or (None, None)), blocks, scale, window)  # pyright: ignore
