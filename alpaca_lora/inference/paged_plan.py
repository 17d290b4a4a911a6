"""The attention plan of one step: store the new keys and values in their blocks, then read each sequence's own.

Three roads, same result: one new token of a sequence (decode), all from the blocks; a prompt from its first place on,
which needs no blocks to be read (the kernel of training); a run of tokens behind others of its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from alpaca_lora.inference.kv_cache import KVCache, places_of
from alpaca_lora.kernels.attention import SegmentLayout, attend_packed
from alpaca_lora.kernels.paged_attention import paged_attention, paged_prefill_attention, write_paged
from alpaca_lora.models.attention import Prefix

# tokens of a chunk that attend together: their scores with all that they see are in memory at once
QUERIES = 256


class Segment(NamedTuple):
    """``count`` new tokens of the sequence that lies in ``blocks``, from place ``start`` on."""

    blocks: np.ndarray
    start: int
    count: int


class PagedPlan:
    """Rows of the stream are the segments' new tokens, in order. Blocks may be shared as long as nobody writes to what
    others read: a sequence that begins with blocks which another one fills in this very step reads them behind it.
    ``num_idle`` rows behind them are of nobody: nothing of them is stored, and what they attend to is zero.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment], num_idle: int = 0) -> None:
        self._cache, self._num_idle = cache, num_idle
        self._places_T = self._tensor(np.concatenate([places_of(*one, cache.block_size) for one in segments]))
        self._decoding: list[Segment] = []
        self._beginning: list[int] = []  # lengths
        self._going_on: list[tuple[slice, Segment, torch.Tensor]] = []
        rows: tuple[list[int], list[int]] = ([], [])
        row = 0
        for segment in segments:
            if segment.count == 1:
                self._decoding.append(segment)
                rows[0].append(row)
            elif segment.start == 0:
                self._beginning.append(segment.count)
                rows[1].extend(range(row, row + segment.count))
            else:
                self._going_on.append((slice(row, row + segment.count), segment, self._tensor(segment.blocks)))
            row += segment.count
        self._is_mixed = max(len(rows[0]), len(rows[1])) < row
        if self._is_mixed:
            self._decode_rows, self._begin_rows = (self._tensor(np.array(one, np.int64)) for one in rows)
        if self._decoding:
            self._tables, self._lengths = self._decode_tables()
        if self._beginning:
            self._layout = SegmentLayout(self._beginning, cache.device)

    def with_prefix(self, prefix: Prefix) -> PagedPlan:
        """The same: whoever made the blocks has put the prefix at the first places of each sequence."""
        return self

    def attend(
        self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """out_THE; a token sees its own sequence up to itself."""
        if self._num_idle:
            busy = slice(0, len(q_THE) - self._num_idle)
            out_THE = self._attend(layer, q_THE[busy], k_TKE[busy], v_TKE[busy], scale, window)
            return torch.cat((out_THE, out_THE.new_zeros(self._num_idle, *out_THE.shape[1:])))
        return self._attend(layer, q_THE, k_TKE, v_TKE, scale, window)

    def _attend(
        self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        write_paged(k_TKE, v_TKE, keys, values, self._places_T)
        if not self._is_mixed:
            if self._decoding:
                return paged_attention(q_THE, keys, values, self._tables, self._lengths, scale, window)
            return attend_packed(q_THE, k_TKE, v_TKE, self._layout, scale, window)
        out_THE = torch.empty_like(q_THE)
        if self._decoding:
            q_BHE = q_THE[self._decode_rows]
            out_BHE = paged_attention(q_BHE, keys, values, self._tables, self._lengths, scale, window)
            out_THE[self._decode_rows] = out_BHE
        if self._beginning:
            q, k, v = (x[self._begin_rows] for x in (q_THE, k_TKE, v_TKE))
            out_THE[self._begin_rows] = attend_packed(q, k, v, self._layout, scale, window)
        for rows, segment, table in self._going_on:
            for first in range(0, segment.count, QUERIES):
                some = slice(rows.start + first, min(rows.start + first + QUERIES, rows.stop))
                place = segment.start + first
                out_THE[some] = paged_prefill_attention(q_THE[some], keys, values, table, place, scale, window)
        return out_THE

    def _decode_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block tables (B, most blocks), filled up with zeros that nobody reads, and lengths (B,), both int32."""
        most = max(len(segment.blocks) for segment in self._decoding)
        tables = np.zeros((len(self._decoding), most), np.int32)
        for table, segment in zip(tables, self._decoding, strict=True):
            table[: len(segment.blocks)] = segment.blocks
        lengths = np.array([segment.start + 1 for segment in self._decoding], np.int32)
        return self._tensor(tables), self._tensor(lengths)

    def _tensor(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._cache.device)
