"""Where keys and values are kept, and the attention plan that reads them. Knows no model, no text, no sampling.

One pair of tensors per layer, (slots, capacity, K, E), made at the layer's first use. Slots are dense: slot i belongs
to the i-th running sequence, so a decode step reads the first B slots as one view; a sequence that ends gives its slot
to the last one. A prefix stands at the front of every slot, once; `lengths` and positions do not count it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from alpaca_lora.kernels.attention import KeysValues, SegmentLayout, attend_packed
from alpaca_lora.models.attention import Prefix


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` new tokens of the sequence in `slot`, which has `start` tokens already."""

    slot: int
    start: int
    count: int


class KVCache:
    """Grows in tokens and in slots by doubling; `lengths[slot]` is the number of tokens a sequence has."""

    def __init__(self, *, min_capacity: int = 256) -> None:
        self.lengths: list[int] = []
        self._capacity = min_capacity
        self._num_slots = 1
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._prefix: Prefix | None = None
        self.prefix_kv: Sequence[KeysValues] = ()  # of each layer
        self.num_virtual = 0  # places at the front of each slot

    def add(self) -> int:
        """The slot of a new, empty sequence."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    @torch.inference_mode()
    def remove(self, slot: int) -> None:
        """End the sequence in `slot`; the last sequence moves into it."""
        last = len(self.lengths) - 1
        if slot != last:
            length = self.lengths[last]
            places = slice(self.num_virtual, self.num_virtual + length)
            for tensors in (self._keys, self._values):
                for stored in tensors.values():
                    stored[slot, places] = stored[last, places]
            self.lengths[slot] = length
        self.lengths.pop()

    def clear(self) -> None:
        """Forget all sequences and the prefix; the memory stays for the next ones."""
        self.lengths.clear()
        self._prefix, self.prefix_kv, self.num_virtual = None, (), 0

    @torch.no_grad()
    def put_prefix(self, prefix: Prefix) -> None:
        """Store ``prefix`` in front of all sequences; evaluated at the first call only, until `clear`."""
        if prefix is self._prefix:
            return
        if self._prefix is not None:
            raise ValueError("the cache holds another prefix: clear it first")
        self._prefix, self.prefix_kv, self.num_virtual = prefix, prefix.keys_values(), prefix.length
        self._reserve()
        for layer in self._keys:
            self._write_prefix(layer)

    def _write_prefix(self, layer: int) -> None:
        for stored, x_PKE in zip((self._keys[layer], self._values[layer]), self.prefix_kv[layer], strict=True):
            stored[:, : self.num_virtual] = x_PKE

    def extend(self, counts: Sequence[tuple[int, int]]) -> CachedPlan:
        """Make room for (slot, number of new tokens); the plan of the forward that brings them, in this order.

        The new tokens count as present from now on: the plan must be run, for every layer, before the next `extend`.
        """
        segments = tuple(Segment(slot, self.lengths[slot], count) for slot, count in counts)
        for segment in segments:
            self.lengths[segment.slot] += segment.count
        self._reserve()
        return CachedPlan(self, segments)

    def layer(self, layer: int, like_TKE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, (slots, capacity, K, E) each; made like `like_TKE` at the first call."""
        keys = self._keys.get(layer)
        if keys is None:
            shape = (self._num_slots, self._capacity, *like_TKE.shape[1:])
            # zeros, not empty: a masked NaN is still a NaN
            keys = self._keys[layer] = like_TKE.new_zeros(shape)
            self._values[layer] = like_TKE.new_zeros(shape)
            if self.num_virtual:
                self._write_prefix(layer)
        return keys, self._values[layer]

    def _reserve(self) -> None:
        num_slots, capacity = self._num_slots, self._capacity
        while num_slots < len(self.lengths):
            num_slots *= 2
        while capacity < self.num_virtual + max(self.lengths, default=0):
            capacity *= 2
        if (num_slots, capacity) == (self._num_slots, self._capacity):
            return
        for tensors in (self._keys, self._values):
            for layer, stored in tensors.items():
                grown = stored.new_zeros((num_slots, capacity, *stored.shape[2:]))
                grown[: self._num_slots, : self._capacity] = stored
                grown[self._num_slots :, : self.num_virtual] = stored[0, : self.num_virtual]
                tensors[layer] = grown
        self._num_slots, self._capacity = num_slots, capacity


class CachedPlan:
    """The attention plan of one forward with a cache: store the new keys and values, then read the whole sequence.

    Three roads, same result: one new token each for the first B slots (decode); segments of sequences that were empty
    (prefill, the same kernel as in training); segments that continue a sequence (later chunks of a long prompt).
    """

    def __init__(self, cache: KVCache, segments: tuple[Segment, ...], num_virtual: int = 0) -> None:
        """``num_virtual``: places that a prefix takes before each sequence; a start below is a place in the slot."""
        self._cache, self._num_virtual = cache, num_virtual
        self._own = segments
        self._segments = segments = tuple(Segment(s.slot, num_virtual + s.start, s.count) for s in segments)
        self._decodes = all(s.count == 1 and s.slot == row for row, s in enumerate(segments))
        self._num_seen = max(s.start + s.count for s in segments)
        self._uniform = all(s.start == segments[0].start for s in segments)
        self._all_new = all(s.start == num_virtual for s in segments)
        self._layout: SegmentLayout | None = None
        self._masks: dict[int | None, torch.Tensor] = {}
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def with_prefix(self, prefix: Prefix) -> CachedPlan:
        """The prefix is evaluated and stored with the cache's first forward and read from there by all others."""
        self._cache.put_prefix(prefix)
        return CachedPlan(self._cache, self._own, prefix.length)

    def attend(
        self,
        layer: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """out_THE. Rows are the segments' new tokens, in order; a token sees its own sequence up to itself."""
        keys, values = self._cache.layer(layer, k_TKE)
        if self._decodes:
            return self._decode(q_THE, k_TKE, v_TKE, keys, values, scale, window)
        row = 0
        for segment in self._segments:
            rows = slice(row, row + segment.count)
            places = slice(segment.start, segment.start + segment.count)
            keys[segment.slot, places] = k_TKE[rows]
            values[segment.slot, places] = v_TKE[rows]
            row += segment.count
        if self._all_new:
            if self._layout is None:
                self._layout = SegmentLayout([s.count for s in self._segments], q_THE.device)
            prefix = self._cache.prefix_kv[layer] if self._num_virtual else None
            return attend_packed(q_THE, k_TKE, v_TKE, self._layout, scale, window, prefix)
        outs, row = [], 0
        for segment in self._segments:
            outs.append(_continue(q_THE[row : row + segment.count], segment, keys, values, scale, window))
            row += segment.count
        return torch.cat(outs)

    def _decode(
        self,
        q_BHE: torch.Tensor,
        k_BKE: torch.Tensor,
        v_BKE: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """One token for each of the first B slots. Query heads that share a key head are rows of one attention."""
        num_seqs, num_heads, width = q_BHE.shape
        first, mask = 0, None
        if self._uniform:
            place = self._num_seen - 1
            keys[:num_seqs, place] = k_BKE
            values[:num_seqs, place] = v_BKE
            if window is not None:
                first = max(0, self._num_seen - window)
        else:
            rows_B, places_B = self._decode_places(q_BHE.device)
            keys[rows_B, places_B] = k_BKE
            values[rows_B, places_B] = v_BKE
            mask = self._decode_mask(window, q_BHE)
        seen_k = keys[:num_seqs, first : self._num_seen].transpose(1, 2)
        seen_v = values[:num_seqs, first : self._num_seen].transpose(1, 2)
        q_BKGE = q_BHE.reshape(num_seqs, seen_k.shape[1], -1, width)
        out_BKGE = F.scaled_dot_product_attention(q_BKGE, seen_k, seen_v, attn_mask=mask, scale=scale)
        return out_BKGE.reshape(num_seqs, num_heads, width)

    def _decode_places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._places is None:
            starts_B = torch.tensor([s.start for s in self._segments], device=device)
            self._places = (torch.arange(len(self._segments), device=device), starts_B)
        return self._places

    def _decode_mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(B, 1, 1, S) to add to the scores: 0 where the token of sequence b sees place s, else -inf."""
        mask = self._masks.get(window)
        if mask is None:
            place_S = torch.arange(self._num_seen, device=like.device)
            ahead_BS = self._decode_places(like.device)[1][:, None] - place_S
            hidden_BS = ahead_BS < 0 if window is None else (ahead_BS < 0) | (ahead_BS >= window)
            mask = like.new_zeros(hidden_BS.shape).masked_fill_(hidden_BS, float("-inf"))[:, None, None, :]
            self._masks[window] = mask
        return mask


def _continue(
    q_THE: torch.Tensor, segment: Segment, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of the new tokens of one sequence to all it has, themselves included."""
    num_seen = segment.start + segment.count
    place_S = torch.arange(num_seen, device=q_THE.device)
    ahead_TS = place_S[segment.start :, None] - place_S
    sees_TS = ahead_TS >= 0 if window is None else (ahead_TS >= 0) & (ahead_TS < window)
    out_HTE = F.scaled_dot_product_attention(
        q_THE.transpose(0, 1)[None],
        keys[segment.slot, :num_seen].transpose(0, 1)[None],
        values[segment.slot, :num_seen].transpose(0, 1)[None],
        attn_mask=sees_TS,
        scale=scale,
        enable_gqa=q_THE.shape[1] != keys.shape[2],
    )
    return out_HTE[0].transpose(0, 1)
