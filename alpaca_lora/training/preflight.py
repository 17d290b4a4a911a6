"""Real steps on the longest micro-batch before the run begins: does it fit, how fast is it, how long will it take; and
with ``gradient_checkpointing`` auto or disk, how little has to be made again in the backward pass, or to be kept in a
file, for it to fit.

Measures, and only then judges. Knows models, adapters and batches; what it prints is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.data.examples import Batch
from alpaca_lora.data.loader import Table
from alpaca_lora.device import available_memory_bytes, current_memory_bytes, peak_memory_bytes, reset_peak_memory
from alpaca_lora.errors import MachineError
from alpaca_lora.kernels.dropout import row_keys
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.recompute import Level
from alpaca_lora.training.activation_levels import choose, count_kept, set_levels
from alpaca_lora.training.loss import Loss
from alpaca_lora.training.micro_batch import is_out_of_memory, on_device, rounded_up

# the first try is an eighth of the longest micro-batch: it warms up, and foretells whether the rest fits
PILOT_SHARE = 8
CHECKPOINTING_SHARE = 0.2  # of the activations that are left: layer inputs and one layer's own
# per trained number: the gradient, and both of Adam's averages in float32 or in 8 bits; those on a disk take none
OPTIMIZER_BYTES = {"float32": 12, "int8": 6.1, "disk": 4}
MASTER_BYTES = 4  # and the weight itself, where it is trained in another dtype
SHORTEST_CUTOFF = 32  # tokens; below it nothing useful is learned
RESERVE = 0.05  # of the peak: the allocator's slack between this measurement and a long run
# the values of gradient_checkpointing that choose, and the level that all layers have where nothing more fits
LEANEST: Mapping[Any, Level] = {"auto": "layer", "disk": "disk"}
TRIES = 3  # mixes of levels that are measured before the one that keeps least is taken


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured. Bytes are of the process, or of the GPU; tokens are of the longest micro-batch.

    ``levels``: what each layer made again in the backward pass, where that was chosen here (auto); else empty.
    """

    baseline_bytes: int
    peak_bytes: int
    num_tokens: int
    longest_row: int
    tokens_per_second: float
    optimizer_bytes: int
    levels: tuple[Level, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """Most memory the run will take: the measured peak, the optimizer's state, a little reserve."""
        return int((self.peak_bytes + self.optimizer_bytes) * (1 + RESERVE))

    @property
    def bytes_per_token(self) -> float:
        return max(0, self.peak_bytes - self.baseline_bytes) / max(1, self.num_tokens)

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Probe:
        """The inverse of `to_record`, after JSON. TypeError for other keys."""
        found = cls(**record)
        return replace(found, levels=tuple(found.levels))


class Sizes(Protocol):
    """The options that decide memory: of `data.options` and `training.options`."""

    batch_size: int
    micro_batch_size: int
    cutoff_len: int
    seed: int
    gradient_checkpointing: Any
    optimizer_state: Any
    max_memory_gb: float | None


def memory_limit(options: Sizes, device: torch.device) -> int:
    """Bytes that the run may take in all: as told, else what the process has and what is free."""
    if options.max_memory_gb is not None:
        return int(options.max_memory_gb * 1e9)
    return current_memory_bytes(device) + available_memory_bytes(device)


def check_fits(measured: Probe, limit: int, options: Sizes) -> None:
    """MachineError when what was measured does not fit into ``limit`` bytes."""
    if measured.needed_bytes > limit:
        refuse(measured, measured.needed_bytes, limit, options, measured.num_tokens)


def foretell(smaller: Probe | None, measured: Probe, num_tokens: int) -> int:
    """Peak bytes of a micro-batch of ``num_tokens``, on the line through one or two smaller ones."""
    slope = measured.bytes_per_token
    if smaller is not None and measured.num_tokens > smaller.num_tokens:
        slope = (measured.peak_bytes - smaller.peak_bytes) / (measured.num_tokens - smaller.num_tokens)
    return int(measured.peak_bytes + slope * max(0, num_tokens - measured.num_tokens))


def longest_batch(table: Table, token_budget: int, batch_size: int) -> Batch:
    """The longest rows of the table, as many as a micro-batch holds: what needs the most memory of all."""
    chosen, total = [], 0
    for row in np.argsort(-table.lengths, kind="stable"):
        length = int(table.lengths[row])
        if len(chosen) == batch_size or (chosen and total + length > token_budget):
            break
        chosen.append(int(row))
        total += length
    return Batch.pack([table[row] for row in chosen])


def probe(
    model: CausalLM, adapter: Adapter, loss: Loss, table: Table, options: Sizes, *,
    device: torch.device | None = None, check_signals: Callable[[], None] = lambda: None,
) -> Probe:  # fmt: skip
    """Run a pilot and two steps, forward and backward; no weight changes and no gradient is left.

    With ``gradient_checkpointing`` auto the levels that fit are chosen, measured and left on the model; a step in which
    every layer keeps its input alone is measured before them. With disk it is one in which all is written to a file.

    Raises MachineError when the pilot foretells, or the step shows, that the run does not fit into
    ``options.max_memory_gb`` (what is free now); the message names the smallest change that would make it fit.
    """
    run = _Run(model, adapter, loss, table, options, device or torch.device("cpu"), check_signals)
    try:
        leanest = LEANEST.get(options.gradient_checkpointing)
        result = run.asked_for() if leanest is None else run.chosen(leanest)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = None
    finally:
        adapter.set_rows(None)
        run.forget_gradients()
    if result is None:
        raise MachineError(
            f"out of memory in the probe of {run.batch.num_tokens:,} tokens", field="micro_batch_size",
            fix="lower micro_batch_size or cutoff_len, or set --gradient_checkpointing",
        )  # fmt: skip
    check_fits(result, run.limit, options)
    return result


class _Run:
    """The steps of one probe. ``batch``: the longest micro-batch."""

    def __init__(
        self, model: CausalLM, adapter: Adapter, loss: Loss, table: Table, options: Sizes, device: torch.device,
        check_signals: Callable[[], None],
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.loss, self.table, self.options = model, adapter, loss, table, options
        self.device, self.check_signals = device, check_signals
        self.batch = longest_batch(table, options.micro_batch_size * options.cutoff_len, options.batch_size)
        self.trained = [parameter for _, parameter in adapter.trained_parameters()]
        each = OPTIMIZER_BYTES[options.optimizer_state]
        self.optimizer_bytes = sum(
            int(p.numel() * (each + (MASTER_BYTES if p.dtype != torch.float32 else 0))) for p in self.trained
        )
        self.baseline, self.limit = current_memory_bytes(device), memory_limit(options, device)

    def asked_for(self) -> Probe:
        """The levels that the options name, all layers alike."""
        set_levels(self.model, self.options.gradient_checkpointing)
        reset_peak_memory(self.device)
        self.pilot()
        self.measured(self.batch)
        return self.measured(self.batch)

    def chosen(self, level: Level) -> Probe:
        """The cheapest levels that fit; where none does, the probe of all layers at ``level``."""
        leanest = (level,) * self.model.config.num_layers
        self.model.gradient_checkpointing = leanest
        reset_peak_memory(self.device)
        pilot_batch = self.pilot()
        least = replace(self.measured(self.batch), levels=leanest)
        stream = rounded_up(pilot_batch)
        per = rounded_up(self.batch).num_tokens / stream.num_tokens
        kept = count_kept(self.model, lambda: self.forward(stream), per)
        room = int((self.limit - least.needed_bytes) / (1 + RESERVE))
        for _ in range(TRIES):
            levels = choose(kept, room, level) if room > 0 else leanest
            if levels == leanest:
                break
            self.model.gradient_checkpointing = levels
            reset_peak_memory(self.device)
            result = replace(self.measured(self.batch), levels=levels)
            if result.needed_bytes <= self.limit:
                return result
            room = _extra(kept, levels, level) - int((result.needed_bytes - self.limit) / (1 + RESERVE))
        self.model.gradient_checkpointing = leanest
        return least

    def pilot(self) -> Batch:
        """A small step, and a larger one where the first foretells no room; MachineError where that does too."""
        batch, options = self.batch, self.options
        small = longest_batch(self.table, max(1, batch.num_tokens // PILOT_SHARE), options.batch_size)
        if small.num_tokens == batch.num_tokens:
            return small  # one row fills a micro-batch: no smaller try is possible
        first = self.measured(small)
        if foretell(None, first, batch.num_tokens) > self.limit:
            # what is not per token weighs much in so small a try: a larger one, and the slope between both
            larger = self.measured(longest_batch(self.table, max(1, batch.num_tokens // 2), options.batch_size))
            foretold = foretell(first, larger, batch.num_tokens)
            if foretold > self.limit:  # a processor's memory is not refused but killed for: not tried
                refuse(larger, foretold + self.optimizer_bytes, self.limit, options, batch.num_tokens)
        return small

    def measured(self, batch: Batch) -> Probe:
        self.check_signals()
        started = time.perf_counter()
        result = self.forward(rounded_up(batch))
        result.backward()
        result.item()  # a GPU has only finished once its result is here
        seconds = time.perf_counter() - started
        self.forget_gradients()
        return Probe(
            self.baseline, peak_memory_bytes(self.device), batch.num_tokens, max(batch.lengths),
            batch.num_tokens / seconds, self.optimizer_bytes,
        )  # fmt: skip

    def forward(self, stream: Batch) -> torch.Tensor:
        """The loss of a micro-batch as the trainer takes it."""
        stream = on_device(stream, self.device)
        self.adapter.set_rows(row_keys(self.options.seed, 0, stream.example_T, stream.positions_T))
        return self.loss(self.model, stream, max(1, stream.num_supervised))

    def forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


def _extra(kept: Any, levels: Sequence[Level], leanest: Level) -> int:
    """Bytes that these levels keep in memory beyond all layers at ``leanest``."""
    return sum(kept[level][i] - kept[leanest][i] for i, level in enumerate(levels))


def refuse(measured: Probe, needed: int, limit: int, options: Sizes, num_tokens: int) -> NoReturn:
    """Raise MachineError with the smallest change that fits."""
    raise MachineError(
        f"the run needs {_gib(needed)} at its peak and may take {_gib(limit)} "
        f"({_gib(measured.baseline_bytes)} before the first step, "
        f"{measured.bytes_per_token / 2**10:,.0f} KiB for each of a micro-batch's tokens)",
        field="micro_batch_size", fix=smallest_change(measured, needed, limit, options, num_tokens),
    )  # fmt: skip


def smallest_change(measured: Probe, needed: int, limit: int, options: Sizes, num_tokens: int) -> str:
    """What to change, and only that: fewer rows in a micro-batch changes no result, a shorter cutoff does.

    ``num_tokens``: of the micro-batch that needs ``needed`` bytes.
    """
    per_token = max(1.0, measured.bytes_per_token * (1 + RESERVE))
    fixed = needed - per_token * num_tokens
    tokens = int((limit - fixed) / per_token)
    if tokens >= options.cutoff_len:
        return f"set --micro_batch_size {tokens // options.cutoff_len} (the result stays the same)"
    checkpointed = int((limit - fixed) / (per_token * CHECKPOINTING_SHARE))
    if options.gradient_checkpointing not in (True, "auto", "disk") and checkpointed >= options.cutoff_len:
        size = min(options.micro_batch_size, checkpointed // options.cutoff_len)
        smaller = f" --micro_batch_size {size}" if size < options.micro_batch_size else ""
        return f"set --gradient_checkpointing auto{smaller} (at most a third slower, the result stays the same)"
    if tokens >= SHORTEST_CUTOFF:
        return f"set --micro_batch_size 1 --cutoff_len {tokens} (longer rows are cut)"
    return "take a smaller base model or a machine with more memory"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
