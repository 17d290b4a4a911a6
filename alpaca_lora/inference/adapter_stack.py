"""Copies of some adapters side by side, so that rows of many adapters take one batched product each for A and for B.

    u_SMR = x_SMD A_SDR      y_SMO += u_SMR (s B)_SRO        S adapters, M rows of each

A decode step of eight adapters would otherwise be 88 products of one row in each layer. The copies are float32 whatever
the model is: processors take five times as long for such small products in bfloat16. Adapters stay in their place from
step to step, so a copy is made only when another one joins. Where the memory of adapters is limited, copies are counted
in it (`copy_room`); without room for them the adapters act one by one. Knows updates; knows no names of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from alpaca_lora.inference.copy_room import CopyRoom
from alpaca_lora.inference.loaded_adapter import LoadedAdapter, LowRank

Names = tuple[str | None, ...]


@dataclass(slots=True)
class StackedGroup:
    """Linears that share an input. A_SDR: those of all ``places`` side by side. B: of each place (S, R, out), scaled.
    Both float32. ranks: of each place the largest, smaller ones are filled up with zeros. written: whose copies.
    """

    places: tuple[int, ...]
    ranks: tuple[int, ...]
    A_SDR: torch.Tensor
    B: tuple[torch.Tensor, ...]
    written: list[LoadedAdapter | None]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.A_SDR, *self.B))


@dataclass(slots=True)
class StackedRows:
    """Rows of a stream in an `AdapterStack`: ``num_rows`` M of each of its first S adapters.

    start: of the S * M rows where they stand in the stack's order; else ``source`` says which row of the stream each
    place of the stack reads (any, where an adapter has fewer than M), and ``targets`` and ``places`` where the results
    go and come from.
    """

    num_adapters: int
    num_rows: int
    start: int | None
    source: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    places: torch.Tensor | None = None


@dataclass(slots=True, eq=False, weakref_slot=True)
class AdapterStack:
    """The copies, by group of linears, made when a group is first asked for. ``room``: None where it is not limited.

    Of one thread; but `clear` and `num_bytes` may be another's.
    """

    room: CopyRoom | None = None
    adapters: list[LoadedAdapter] = field(default_factory=list)
    groups: dict[Names, StackedGroup] = field(default_factory=dict)
    _empty: dict[Names, list[LoadedAdapter]] = field(default_factory=dict)
    _crowded: dict[Names, list[LoadedAdapter]] = field(default_factory=dict)  # for whom there was no room

    def __post_init__(self) -> None:
        if self.room is not None:
            self.room.join(self)

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for group in list(self.groups.values()))

    def clear(self) -> None:
        """Drop the copies. A forward that goes on has hold of those that it multiplies with."""
        self.groups.clear()

    def seat(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Have exactly these adapters, each of those that were there already in its old place where that still is."""
        wanted, size = set(adapters), len(adapters)
        seats: list[LoadedAdapter | None] = [a if a in wanted else None for a in self.adapters[:size]]
        seats += [None] * (size - len(seats))
        new = iter([a for a in adapters if a not in seats])
        self.adapters = [next(new) if a is None else a for a in seats]

    def lay(self, runs: Sequence[tuple[int, int, LoadedAdapter]], device: torch.device) -> StackedRows:
        """Take rows [start, stop) of each adapter, one run for each."""
        self.seat([adapter for _, _, adapter in runs])
        place_of = {id(adapter): place for place, adapter in enumerate(self.adapters)}
        ordered = sorted(runs, key=lambda run: place_of[id(run[2])])
        num_rows, first = max(stop - start for start, stop, _ in runs), ordered[0][0]
        if all((s, e) == (first + at * num_rows, first + (at + 1) * num_rows) for at, (s, e, _) in enumerate(ordered)):
            return StackedRows(len(runs), num_rows, first)
        source, targets, places = [], [], []
        for at, (start, stop, _) in enumerate(ordered):
            own = list(range(start, stop))
            targets += own
            places += range(at * num_rows, at * num_rows + len(own))
            source += own + [start] * (num_rows - len(own))
        return StackedRows(
            len(runs), num_rows, None, *(torch.tensor(index, device=device) for index in (source, targets, places))
        )

    def add(self, rows: StackedRows, names: Names, x_TD: torch.Tensor, outputs: Sequence[torch.Tensor]) -> bool:
        """What the adapters do to their rows of the outputs (T, out) of linears that share x, in place; False, with
        nothing done, where there is no room for their copies.
        """
        group = self.group(names)
        if group is None:
            return names not in self._crowded
        size, count, start = rows.num_adapters, rows.num_rows, rows.start
        taken = x_TD[rows.source] if start is None else x_TD[start : start + size * count]
        u_SMR = torch.bmm(taken.reshape(size, count, -1).float(), group.A_SDR[:size])
        us = (u_SMR,) if len(group.ranks) == 1 else u_SMR.split(group.ranks, dim=2)
        for place, u, b_SRO in zip(group.places, us, group.B, strict=True):
            y_TO = outputs[place]
            if start is None:
                added = torch.bmm(u, b_SRO[:size]).view(size * count, -1)[rows.places]
                y_TO.index_copy_(0, rows.targets, (y_TO[rows.targets] + added).to(y_TO.dtype))  # pyright: ignore
                continue
            y_SMO = y_TO[start : start + size * count].view(size, count, -1)
            if y_TO.dtype == torch.float32:
                y_SMO.baddbmm_(u, b_SRO[:size])
            else:
                y_SMO.add_(torch.bmm(u, b_SRO[:size]))
        return True

    def group(self, names: Names) -> StackedGroup | None:
        """The copies for these linears, brought up to date; None where none of the adapters has any, or no room is left
        for them.
        """
        found = self.groups.get(names)
        if found is not None and found.written[: len(self.adapters)] == self.adapters:
            return found
        if found is None and self.adapters in (self._empty.get(names), self._crowded.get(names)):
            return None
        with torch.inference_mode(False), torch.no_grad():  # outlives the forward that asks
            return self._write(names, found)

    def _write(self, names: Names, found: StackedGroup | None) -> StackedGroup | None:
        parts = [{p.place: p for p in group.parts} if (group := a.group(names)) else {} for a in self.adapters]
        ranks: dict[int, int] = {}
        for own in parts:
            for place, part in own.items():
                ranks[place] = max(ranks.get(place, 0), len(part.update.A_RD))
        self._crowded.pop(names, None)
        if not ranks:
            self.groups.pop(names, None)
            self._empty[names] = list(self.adapters)
            return None
        if found is None or not _holds(found, ranks, len(self.adapters)):
            like = {place: part.update for own in parts for place, part in own.items()}
            found = self._grown(names, ranks, like, max(len(self.adapters), 0 if found is None else len(found.written)))
            if found is None:
                self._crowded[names] = list(self.adapters)
                return None
        firsts = [sum(found.ranks[:at]) for at in range(len(found.ranks))]
        for seat, (adapter, own) in enumerate(zip(self.adapters, parts, strict=True)):
            if found.written[seat] is adapter:
                continue
            found.written[seat] = adapter
            found.A_SDR[seat].zero_()
            for place, first, b_SRO in zip(found.places, firsts, found.B, strict=True):
                b_SRO[seat].zero_()
                if (part := own.get(place)) is not None:
                    rank = len(part.update.A_RD)
                    found.A_SDR[seat, :, first : first + rank] = part.update.A_RD.t()
                    b_SRO[seat, :rank] = part.B_RO
                    b_SRO[seat, :rank] *= part.update.scale
        return found

    def _grown(
        self, names: Names, ranks: dict[int, int], like: dict[int, LowRank], size: int
    ) -> StackedGroup | None:  # fmt: skip
        """A group of zeros in the place of the one that was too small; None where there is no room for it."""
        self.groups.pop(names, None)
        if self.room is None:
            found = self.groups[names] = _new_group(ranks, like, size)
            return found
        with self.room.claim(_bytes_of(ranks, like, size)) as fits:
            if not fits:
                return None
            found = self.groups[names] = _new_group(ranks, like, size)
            return found


def _bytes_of(ranks: dict[int, int], like: dict[int, LowRank], size: int) -> int:
    """Of `_new_group`."""
    widths = {place: like[place].A_RD.shape[1] + len(like[place].B_OR) for place in ranks}
    return 4 * size * sum(rank * widths[place] for place, rank in ranks.items())


def _holds(group: StackedGroup, ranks: dict[int, int], size: int) -> bool:
    room = dict(zip(group.places, group.ranks, strict=True))
    return size <= len(group.written) and all(room.get(place, 0) >= rank for place, rank in ranks.items())


def _new_group(ranks: dict[int, int], like: dict[int, LowRank], size: int) -> StackedGroup:
    """Zeros of the shapes and kind of ``like``, one update of each place."""
    places = tuple(sorted(ranks))
    widths = tuple(ranks[place] for place in places)
    a_RD = like[places[0]].A_RD

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(size, *shape, dtype=torch.float32, device=a_RD.device)

    B = tuple(zeros(ranks[place], len(like[place].B_OR)) for place in places)
    return StackedGroup(places, widths, zeros(a_RD.shape[1], sum(widths)), B, [None] * size)
