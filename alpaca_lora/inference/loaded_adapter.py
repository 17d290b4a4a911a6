"""An adapter in memory, ready to stand beside others: what it adds to each linear, its virtual tokens, its head.

Knows tensors; knows neither files nor the model it is used with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.kernels.low_rank_rows import LowRankRows
from alpaca_lora.kernels.scale import scale_columns
from alpaca_lora.models.classifier import Score


@dataclass(slots=True, eq=False)
class LowRank:
    """What an adapter does to the output y = x W^T + b of one linear:  y + s x A^T B^T, and for DoRA that sum without b
    times m / ||W + s B A||.

    A (R, in) and B (out, R) have the model's compute dtype, as a single attached adapter has them when it multiplies;
    DoRA's magnitude m and inverse norm (out,) are float32.
    """

    A_RD: torch.Tensor
    B_OR: torch.Tensor
    scale: float
    magnitude_O: torch.Tensor | None = None
    inverse_norm_O: torch.Tensor | None = None

    def finish_(self, y_TO: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """DoRA's factor on the sum of base and update, in place."""
        if self.magnitude_O is not None:
            y_TO.copy_(scale_columns(y_TO, self.magnitude_O, self.inverse_norm_O, bias_O))


class Part(NamedTuple):
    """One linear of a group: its place there, what is added to it, and B^T (R, out)."""

    place: int
    update: LowRank
    B_RO: torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """An adapter's updates of linears that share an input: A^T of all of them side by side (in, R1 + R2 + ...); rows:
    the same as C reads it, None where it cannot.
    """

    A_DR: torch.Tensor
    ranks: tuple[int, ...]
    parts: tuple[Part, ...]
    rows: LowRankRows | None


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One adapter of an `AdapterBank`. ``digest``: sha256 of all that changes its outputs (weights, ranks and scales,
    the base's fingerprint): two adapters of one digest are one, and the key of what is cached for either.

    num_bytes: of its tensors. updates: full name of a linear -> what is added. prefix: keys and values (P, K, E) of its
    ``num_virtual`` virtual tokens in each layer. score: a classifier's head, ``labels`` in the order of its outputs.
    messages: what the user should be told. ``updates``, ``prefix`` and ``score`` are gone while it is not resident.
    """

    name: str
    folder: Path
    method: str
    digest: str
    num_bytes: int
    record: AdapterRecord | None
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    num_virtual: int = 0
    prefix: Sequence[KeysValues] | None = None
    labels: tuple[str, ...] = ()
    score: Score | None = None
    messages: tuple[str, ...] = ()
    is_resident: bool = True
    largest_rank: int = field(init=False)
    is_scaled: bool = field(init=False)  # DoRA: outputs have a factor
    _groups: dict[tuple[str | None, ...], Group | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.largest_rank = max((len(update.A_RD) for update in self.updates.values()), default=0)
        self.is_scaled = any(update.magnitude_O is not None for update in self.updates.values())

    def group(self, names: tuple[str | None, ...]) -> Group | None:
        """Its updates of the linears ``names``, which share an input; None where it has none of them.

        Made at the first call: then the A of each lies inside of the common one, and no memory is taken twice.
        """
        try:
            return self._groups[names]
        except KeyError:
            group = self._groups[names] = self._joined(names)
            return group

    def _joined(self, names: tuple[str | None, ...]) -> Group | None:
        found = [(place, self.updates[n]) for place, n in enumerate(names) if n is not None and n in self.updates]
        if not found:
            return None
        ranks = tuple(len(update.A_RD) for _, update in found)
        with torch.inference_mode(False), torch.no_grad():  # outlives the forward that asks first
            joined = found[0][1].A_RD if len(found) == 1 else torch.cat([update.A_RD for _, update in found])
            for (_, update), a_RD in zip(found, joined.split(ranks), strict=True):
                update.A_RD = a_RD
                # B^T lies row by row, as who adds to few rows reads it; a matrix product takes either
                update.B_OR = update.B_OR.t().contiguous().t()
            parts = tuple(Part(place, update, update.B_OR.t()) for place, update in found)
            rows = LowRankRows.of(joined, [(place, B_RO, update.scale) for place, update, B_RO in parts])
            return Group(joined.t(), ranks, parts, rows)

    def leave(self) -> None:
        """Give the memory back; what describes it stays."""
        self.updates, self.prefix, self.score, self.is_resident = {}, None, None, False
        self._groups = {}
