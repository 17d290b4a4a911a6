"""A linear in front of which the adapters of a bank stand: each row of the stream gets its own adapter, or none.

    y = x W^T + b for all rows at once, then for each run of rows with one adapter:  y += s x A^T B^T

The few rows of a decode step go in one call (kernels/low_rank_rows.py) where there is a processor with a compiler; else
runs of few rows are stacked (inference/adapter_stack.py), longer ones go one by one. Linears that share an input share
the product with A. Rows of the base alone pay nothing. Knows runs of rows; knows
neither names of adapters nor who loads them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from alpaca_lora.inference.adapter_stack import AdapterStack, StackedRows
from alpaca_lora.inference.copy_room import CopyRoom
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.kernels.few_rows import FEW_ROWS
from alpaca_lora.kernels.low_rank_rows import LowRankRows, add_low_rank, is_ready
from alpaca_lora.models.linear import project

# Runs of few rows are stacked: on ten layers of SmolLM2-135M's shapes, rank 16, one core of an EPYC 9004, 8 adapters of
# one row take 4.8 ms in bfloat16 and 4.7 in float32 so, 25.4 and 11.5 one by one; one takes 1.2 and 0.7, not 3.0, 1.1
MAX_STACKED_ROWS, MAX_STACKED_RANK = 16, 64  # of an adapter; all others are filled up to the most


class Run(NamedTuple):
    """Rows [start, stop) of the stream, all of one adapter."""

    start: int
    stop: int
    adapter: LoadedAdapter


class BankRows(threading.local):
    """Whose rows the next forward of this thread has; shared by all linears of a bank. A thread that never said
    anything runs the base alone: an adapter that is being evaluated beside a running forward does.
    """

    all_runs: tuple[Run, ...] = ()
    direct: tuple[Run, ...] = ()  # those whose rows go in one call; else
    runs: tuple[Run, ...] = ()  # those that go one by one
    stacked: StackedRows | None = None  # and those that go together,
    together: tuple[Run, ...] = ()  # the same as runs,
    scaled: tuple[Run, ...] = ()  # of which these have a factor (DoRA)
    num_rows: int | None = None  # None: any number, all of them the base's

    def __init__(self, device: torch.device, *, stacks: bool = True, room: CopyRoom | None = None) -> None:
        """``stacks`` False: all runs go one by one, the plain form of the same. room: of the stacks' copies."""
        self.device, self.stacks = device, stacks
        self.stack = AdapterStack(room)

    def set(self, rows: Sequence[tuple[LoadedAdapter | None, int]]) -> None:
        """(adapter, number of rows) in stream order. ValueError for an adapter that is not resident."""
        runs: list[Run] = []
        start = 0
        for adapter, count in rows:
            stop = start + count
            if count < 0:
                raise ValueError(f"{count} rows")
            if adapter is not None and not adapter.is_resident:
                raise ValueError(f"adapter {adapter.name!r} is not in memory: acquire it first")
            if adapter is not None and adapter.updates and count:
                if runs and runs[-1].adapter is adapter and runs[-1].stop == start:
                    start = runs.pop().start
                runs.append(Run(start, stop, adapter))
            start = stop
        self._take(runs, start)

    def _take(self, runs: Sequence[Run], num_rows: int) -> None:
        """Few rows go in one call. Else runs of few rows go together; a second run of the same adapter does not."""
        if runs and self.stacks and num_rows <= FEW_ROWS and is_ready(self.device):
            self.all_runs, self.num_rows, self.direct = tuple(runs), num_rows, tuple(runs)
            self.runs, self.together, self.stacked = (), (), None
            self.scaled = tuple(run for run in runs if run.adapter.is_scaled)
            return
        small: dict[int, Run] = {}
        for run in runs if self.stacks else ():
            if run.stop - run.start <= MAX_STACKED_ROWS and run.adapter.largest_rank <= MAX_STACKED_RANK:
                small.setdefault(id(run.adapter), run)
        together = tuple(small.values())
        self.all_runs, self.num_rows, self.direct = tuple(runs), num_rows, ()
        self.runs = tuple(run for run in runs if small.get(id(run.adapter)) is not run)
        self.together = together
        self.scaled = tuple(run for run in together if run.adapter.is_scaled)
        self.stacked = self.stack.lay(together, self.device) if together else None

    def select(self, places: Sequence[int]) -> None:
        """Go on with these rows of the stream alone, in rising order."""
        runs = [
            Run(bisect_left(places, start), bisect_left(places, stop), adapter)
            for start, stop, adapter in self.all_runs
        ]
        self._take([run for run in runs if run.start < run.stop], len(places))

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base alone inside, whatever was said before."""
        before = self.direct, self.runs, self.stacked, self.scaled, self.num_rows
        self.direct, self.runs, self.stacked, self.scaled, self.num_rows = (), (), None, (), None
        try:
            yield
        finally:
            self.direct, self.runs, self.stacked, self.scaled, self.num_rows = before


class BankedLinear(nn.Module):
    """Stands where ``base`` stood, under its full ``name``. Keeps `models.linear.LinearContract`; `dense_weight` and
    all else that is not a product with rows is the base's.
    """

    def __init__(self, base: nn.Module, name: str, rows: BankRows) -> None:
        super().__init__()
        self.base, self.name, self.rows = base, name, rows
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # pyright: ignore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_together(x, (self,))[0]

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), in a bank or not.

        ValueError when x has another number of rows than was announced.
        """
        rows = next(one.rows for one in linears if isinstance(one, BankedLinear))
        bases = [one.base if isinstance(one, BankedLinear) else one for one in linears]
        outputs = project(x, bases)
        if not rows.direct and not rows.runs and rows.stacked is None:
            return outputs
        x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        if x_TD.shape[0] != rows.num_rows:
            raise ValueError(f"{rows.num_rows} rows were announced, the input has {x_TD.shape[0]}: call set_rows")
        ys = [y if y.ndim == 2 else y.view(-1, y.shape[-1]) for y in outputs]
        names = tuple(one.name if isinstance(one, BankedLinear) else None for one in linears)
        if rows.direct:
            _add_rows(rows.direct, names, x_TD, ys)
        stacked = rows.stacked is not None and rows.stack.add(rows.stacked, names, x_TD, ys)
        for run in rows.runs if stacked else (*rows.runs, *rows.together):
            _add_run(run, names, x_TD, ys)
        for start, stop, adapter in (*rows.runs, *rows.scaled):
            if adapter.is_scaled and (group := adapter.group(names)) is not None:
                for place, update, _ in group.parts:
                    update.finish_(ys[place][start:stop], getattr(bases[place], "bias", None))
        return outputs

    def dense_weight(self) -> torch.Tensor:
        return self.base.dense_weight()  # pyright: ignore

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


def _add_rows(
    runs: Sequence[Run], names: tuple[str | None, ...], x_TD: torch.Tensor, outputs: Sequence[torch.Tensor]
) -> None:
    """What all adapters add to their rows, in one call; in place."""
    updates: list[LowRankRows | None] = [None] * x_TD.shape[0]
    for run in runs:
        if (group := run.adapter.group(names)) is None:
            continue
        if group.rows is None or group.rows.dtype != x_TD.dtype:
            _add_run(run, names, x_TD, outputs)
        else:
            updates[run.start : run.stop] = [group.rows] * (run.stop - run.start)
    if any(one is not None for one in updates):
        add_low_rank(updates, x_TD, outputs)


def _add_run(run: Run, names: tuple[str | None, ...], x_TD: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """What one adapter adds to its rows, in place."""
    start, stop, adapter = run
    group = adapter.group(names)
    if group is None:
        return
    wide = torch.float32 if x_TD.device.type == "cpu" else x_TD.dtype  # see Runner: no products for each number of rows
    u_TR = x_TD[start:stop].to(wide) @ group.A_DR.to(wide)
    us = (u_TR,) if len(group.ranks) == 1 else u_TR.split(group.ranks, dim=1)
    for (place, update, B_RO), u in zip(group.parts, us, strict=True):
        y_TO = outputs[place][start:stop]
        if y_TO.dtype == wide:
            y_TO.addmm_(u, B_RO, alpha=update.scale)
        else:
            y_TO.add_(u @ B_RO.to(wide), alpha=update.scale)
