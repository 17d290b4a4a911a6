"""Attention over keys and values that lie in blocks of a pool, and writing them there.

A pool of one layer is two tensors (num_blocks, block, K, E), the block a power of two. Place s of a sequence is row
``s % block`` of the block ``table[s // block]``; sequences may share blocks. What lies behind a sequence's length, or
in blocks that no table names, is never read: it may be anything.

One new token of each sequence is in C where the library is there: keys and values are read once for all query heads of
a key head, parts of long sequences are shared among threads, and neither threads nor the other sequences change a bit.
Elsewhere, and for chunks of prompts, a sequence's rows are gathered for torch's own attention. No gradients.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.cpu.library import library
from alpaca_lora.kernels.reference import visible

DTYPES = (torch.float32, torch.bfloat16)  # of the op in C
MAX_WIDTH = 256  # of a head, in C
# what the ops in C return besides 0; 1 is no memory
WRONG_LENGTH, WRONG_BLOCK = 2, 3


class _Sizes(ctypes.Structure):
    """`Sizes` of cpu/paged_attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_sequences", "heads", "kv_heads", "width")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "block", "table_width", "window")),
        ("scale", ctypes.c_float), ("is_bfloat16", ctypes.c_int32),
    )  # fmt: skip


def paged_attention(
    q_BHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
    scale: float, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q k^T) v of one new token of each sequence over the places it has -> (B, H, E), in q's dtype.

    tables: int32 (B, most blocks); lengths: int32 (B,), places of each sequence, its new token's included; window: the
    last so many places only. Query head h reads key head h // (H / K). ValueError for what does not fit together, a
    length that the table cannot hold, or a block outside of the pool (on a GPU torch finds the last two, or nobody).
    """
    num_seqs, heads, width = q_BHE.shape
    _check_pool(q_BHE, keys, values, window)
    if tables.shape[:1] != lengths.shape or lengths.shape != (num_seqs,) or tables.dim() != 2:
        raise ValueError(f"{num_seqs} tokens, tables {tuple(tables.shape)}, lengths {tuple(lengths.shape)}")
    if not tables.dtype == lengths.dtype == torch.int32 or not tables.device == lengths.device == q_BHE.device:
        raise ValueError(f"int32 tables and lengths on {q_BHE.device}, not {tables.dtype} and {lengths.dtype}")
    if q_BHE.device.type != "cpu":
        return attend_padded(q_BHE, keys, values, tables, lengths, scale, window)
    found = library() if q_BHE.dtype in DTYPES and width <= MAX_WIDTH else None
    if found is None or found.handle is None:
        return attend_gathered(q_BHE, keys, values, tables, lengths, scale, window)
    num_blocks, block, kv_heads, _ = keys.shape
    out_BHE = torch.empty(q_BHE.shape, dtype=q_BHE.dtype)
    sizes = _Sizes(
        num_seqs, heads, kv_heads, width, num_blocks, block, tables.shape[1], window or 0, scale,
        q_BHE.dtype == torch.bfloat16,
    )  # fmt: skip
    problem = found.call(
        "paged_attention", q_BHE.contiguous(), keys, values, tables.contiguous(), lengths.contiguous(), out_BHE,
        ctypes.byref(sizes), work=2 * tables.numel() * block * kv_heads * width,
    )  # fmt: skip
    if problem:
        _explain(problem, tables, lengths, num_blocks, block)
    return out_BHE


def write_paged(
    k_TKE: torch.Tensor, v_TKE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor
) -> None:
    """Put token t's keys and values into row ``places[t]`` of the pool, int64 (T,): block * block size + offset.

    ValueError for what does not fit together or a place outside of the pool, before anything is written.
    """
    _check_pool(k_TKE, keys, values, None)
    if k_TKE.shape != v_TKE.shape or k_TKE.shape[1:] != keys.shape[2:] or v_TKE.dtype != k_TKE.dtype:
        raise ValueError(f"keys {tuple(k_TKE.shape)} and values {tuple(v_TKE.shape)} for {tuple(keys.shape)}")
    if places.shape != k_TKE.shape[:1] or places.dtype != torch.int64:
        raise ValueError(f"{k_TKE.shape[0]} int64 places, not {tuple(places.shape)} of {places.dtype}")
    num_rows = keys.shape[0] * keys.shape[1]
    if k_TKE.device.type != "cpu" or library().handle is None:
        if (
            places.device.type == "cpu"
            and places.numel()
            and not 0 <= int(places.min()) <= int(places.max()) < num_rows
        ):
            raise ValueError(f"places from {int(places.min())} to {int(places.max())} in a pool of {num_rows}")
        for pool, new_TKE in ((keys, k_TKE), (values, v_TKE)):
            pool.flatten(0, 1).index_copy_(0, places, new_TKE)
        return
    k_TKE, v_TKE = _whole_rows(k_TKE), _whole_rows(v_TKE)
    size = k_TKE.element_size()
    problem = library().call(
        "write_paged", k_TKE, v_TKE, keys, values, places.contiguous(), k_TKE.shape[0],
        k_TKE.shape[1] * k_TKE.shape[2] * size, k_TKE.stride(0) * size, v_TKE.stride(0) * size, num_rows, work=0,
    )  # fmt: skip
    if problem:
        raise ValueError(f"places from {int(places.min())} to {int(places.max())} in a pool of {num_rows}")


def paged_prefill_attention(
    q_THE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, start: int, scale: float,
    window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """As `paged_attention` of T new tokens of one sequence, at places ``start`` to ``start + T - 1``, causal.

    -> (T, H, E). Their own keys and values are in the pool already. table: int32 (most blocks).
    """
    _check_pool(q_THE, keys, values, window)
    num_new = q_THE.shape[0]
    first = 0 if window is None else max(0, start - window + 1)
    k_SKE, v_SKE = _gather(keys, values, table, first, start + num_new)
    mask = visible(num_new, window, q_THE.device, start - first)
    return _attend(q_THE.transpose(0, 1)[None], k_SKE[None], v_SKE[None], mask, scale)[0].transpose(0, 1)


def attend_gathered(
    q_BHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
    scale: float, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` in torch, a sequence at a time."""
    outs = []
    for q_HE, table, length in zip(q_BHE, tables, lengths.tolist(), strict=True):
        k_SKE, v_SKE = _gather(keys, values, table, 0 if window is None else max(0, length - window), length)
        q_KGE = q_HE.reshape(keys.shape[2], -1, keys.shape[3])
        outs.append(_attend(q_KGE[None], k_SKE[None], v_SKE[None], None, scale).flatten(0, 2))
    return torch.stack(outs)


def attend_padded(
    q_BHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
    scale: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """The same in one call for all sequences, for a device where a look at the lengths would wait for it."""
    block = keys.shape[1]
    place_S = torch.arange(tables.shape[1] * block, device=q_BHE.device)
    seen_BS = place_S < lengths[:, None]
    # a table may hold anything behind the blocks in use, and blocks anything behind the length: NaN times 0 is NaN
    used = torch.where(seen_BS[:, ::block], tables, 0)
    k_BSKE, v_BSKE = (
        pool[used].flatten(1, 2).masked_fill(~seen_BS[:, :, None, None], 0) for pool in (keys, values)
    )  # fmt: skip
    if window is not None:
        seen_BS = seen_BS & (place_S >= lengths[:, None] - window)
    q_BKGE = q_BHE.reshape(q_BHE.shape[0], keys.shape[2], -1, keys.shape[3])
    return _attend(q_BKGE, k_BSKE, v_BSKE, seen_BS[:, None, None], scale).reshape(q_BHE.shape)


def _attend(
    q_NHTE: torch.Tensor, k_NSKE: torch.Tensor, v_NSKE: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's attention, (N, H, T, E); mask: True where a token sees a place. One token's query heads of a key head are
    given as that many tokens of one head: in bfloat16 that takes a quarter of the time.
    """
    return F.scaled_dot_product_attention(
        q_NHTE, k_NSKE.transpose(1, 2), v_NSKE.transpose(1, 2), attn_mask=mask, scale=scale,
        enable_gqa=q_NHTE.shape[1] != k_NSKE.shape[2],
    )  # fmt: skip


def _gather(
    keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (last - first, K, E) of places [first, last) of one sequence."""
    num_blocks, block = keys.shape[:2]
    blocks = table[first // block : -(-last // block)]
    skipped = first // block * block
    if not 0 <= first < last <= table.shape[0] * block:
        raise ValueError(f"places {first} to {last} in a table of {table.shape[0]} blocks of {block}")
    if blocks.device.type == "cpu" and not 0 <= int(blocks.min()) <= int(blocks.max()) < num_blocks:
        raise ValueError(f"blocks from {int(blocks.min())} to {int(blocks.max())} in a pool of {num_blocks}")
    k, v = (pool.index_select(0, blocks).flatten(0, 1)[first - skipped : last - skipped] for pool in (keys, values))
    return k, v


def _whole_rows(x_TKE: torch.Tensor) -> torch.Tensor:
    """The tensor with each token's numbers side by side; tokens may lie apart, as columns of a wider product do."""
    return x_TKE if x_TKE.stride()[1:] == (x_TKE.shape[2], 1) else x_TKE.contiguous()


def _check_pool(x_THE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> None:
    """ValueError where addresses that C computes would be wrong."""
    if keys.shape != values.shape or keys.dim() != 4 or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"contiguous pools of one shape, not {tuple(keys.shape)} and {tuple(values.shape)}")
    block, kv_heads, width = keys.shape[1:]
    if block < 1 or block & (block - 1):
        raise ValueError(f"blocks of {block} places: not a power of two")
    if x_THE.shape[2] != width or x_THE.shape[1] < 1 or x_THE.shape[1] % kv_heads:
        raise ValueError(f"heads of {tuple(x_THE.shape)} do not fit those of the pool {tuple(keys.shape)}")
    if not x_THE.dtype == keys.dtype == values.dtype or not x_THE.device == keys.device == values.device:
        raise ValueError(f"{x_THE.dtype} on {x_THE.device} and a pool of {keys.dtype} on {keys.device}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} places")


def _explain(problem: int, tables: torch.Tensor, lengths: torch.Tensor, num_blocks: int, block: int) -> NoReturn:
    if problem == WRONG_LENGTH:
        raise ValueError(f"lengths {lengths.tolist()} in tables of {tables.shape[1]} blocks of {block}")
    if problem == WRONG_BLOCK:
        raise ValueError(f"a block outside of the pool of {num_blocks} in {tables.tolist()}")
    raise MemoryError("paged_attention found no memory for its sums")
