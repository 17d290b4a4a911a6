"""Attention plans: which tokens see which. The decoder hands q, k, v of every layer to the plan and knows no more.

Here is the plan of training and evaluation; inference has its own, over the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from alpaca_lora.kernels.attention import SegmentLayout, attend_packed


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


class Packed:
    """A stream of independent sequences: causal within each segment, blind across segments."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """``lengths``: tokens of each segment, in order; their sum is T."""
        self.lengths = tuple(int(length) for length in lengths)
        self._layout: SegmentLayout | None = None

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
        return attend_packed(q_THE, k_TKE, v_TKE, self._layout, scale, window)
