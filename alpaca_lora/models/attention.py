"""Attention plans: which tokens see which. The decoder hands q, k, v of every layer to the plan and knows no more.

Here is the plan of training and evaluation; inference has its own, over the cache. A prefix, keys and values that
every token sees besides its own segment, is part of the plan: layers do not know of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from alpaca_lora.kernels.attention import KeysValues, SegmentLayout, attend_packed


class Prefix(Protocol):
    """Virtual tokens in front of every segment: they take positions 0 to ``length`` - 1 (Li and Liang 2021)."""

    length: int

    def keys_values(self) -> Sequence[KeysValues]:
        """Keys, as rotated as they will ever be, and values of every layer, in the model's dtype; gradients flow."""
        ...


class AttentionPlan(Protocol):
    """Says which tokens of the stream see which; an argument of ``forward``, made anew for each stream."""

    def attend(
        self,
        layer: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """softmax(scale q k^T) v over the tokens that each query sees -> (T, H, E).

        Keys and values are rotated and normalised already. ``window``: a token sees the last ``window`` tokens, itself
        among them; None: all before it. Query head h reads key head h // (H / K).
        """
        ...

    def with_prefix(self, prefix: Prefix) -> AttentionPlan:
        """The plan whose every segment stands behind ``prefix``; its tokens' positions are ``prefix.length`` higher."""
        ...


class Packed:
    """A stream of independent sequences: causal within each segment, blind across segments."""

    def __init__(self, lengths: Sequence[int], prefix: Sequence[KeysValues] | None = None) -> None:
        """``lengths``: tokens of each segment, in order; their sum is T. ``prefix``: of each layer, before each."""
        self.lengths = tuple(int(length) for length in lengths)
        self.prefix = prefix
        self._layout: SegmentLayout | None = None

    def with_prefix(self, prefix: Prefix) -> Packed:
        """Evaluates the prefix: once per forward, for all layers and outside of those that are checkpointed."""
        return Packed(self.lengths, prefix.keys_values())

    def attend(
        self,
        layer: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if self._layout is None:  # once per stream, shared by all layers
            self._layout = SegmentLayout(self.lengths, q_THE.device)
        prefix = None if self.prefix is None else self.prefix[layer]
        return attend_packed(q_THE, k_TKE, v_TKE, self._layout, scale, window, prefix)
