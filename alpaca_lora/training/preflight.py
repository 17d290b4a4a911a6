"""Two real steps on the longest micro-batch before the run begins: does it fit, how fast is it, how long will it take.

Measures, and only then judges. Knows models, adapters and batches; what it prints is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from alpaca_lora.training.loss import Loss
from alpaca_lora.training.micro_batch import is_out_of_memory, on_device, rounded_up

# the first try is an eighth of the longest micro-batch: it warms up, and foretells whether the rest fits
PILOT_SHARE = 8
CHECKPOINTING_SHARE = 0.2  # of the activations that are left: layer inputs and one layer's own
OPTIMIZER_BYTES = 12  # per trained number: gradient and both of Adam's averages, float32
MASTER_BYTES = 4  # and the weight itself, where it is trained in another dtype
SHORTEST_CUTOFF = 32  # tokens; below it nothing useful is learned
RESERVE = 0.05  # of the peak: the allocator's slack between this measurement and a long run


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured. Bytes are of the process, or of the GPU; tokens are of the longest micro-batch."""

    baseline_bytes: int
    peak_bytes: int
    num_tokens: int
    longest_row: int
    tokens_per_second: float
    optimizer_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Most memory the run will take: the measured peak, the optimizer's state, a little reserve."""
        return int((self.peak_bytes + self.optimizer_bytes) * (1 + RESERVE))

    @property
    def bytes_per_token(self) -> float:
        return max(0, self.peak_bytes - self.baseline_bytes) / max(1, self.num_tokens)

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


class Sizes(Protocol):
    """The options that decide memory: of `data.options` and `training.options`."""

    batch_size: int
    micro_batch_size: int
    cutoff_len: int
    seed: int
    gradient_checkpointing: bool
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

    Raises MachineError when the pilot foretells, or the step shows, that the run does not fit into
    ``options.max_memory_gb`` (what is free now); the message names the smallest change that would make it fit.
    """
    device = device or torch.device("cpu")
    batch = longest_batch(table, options.micro_batch_size * options.cutoff_len, options.batch_size)
    trained = [parameter for _, parameter in adapter.trained_parameters()]
    baseline = current_memory_bytes(device)
    limit = memory_limit(options, device)
    model.gradient_checkpointing = options.gradient_checkpointing
    optimizer_bytes = sum(
        p.numel() * (OPTIMIZER_BYTES + (MASTER_BYTES if p.dtype != torch.float32 else 0)) for p in trained
    )

    def measured(one: Batch) -> Probe:
        seconds = _step(model, adapter, loss, one, options.seed, device)
        for parameter in trained:
            parameter.grad = None
        return Probe(
            baseline, peak_memory_bytes(device), one.num_tokens, max(one.lengths), one.num_tokens / seconds,
            optimizer_bytes,
        )  # fmt: skip

    reset_peak_memory(device)
    try:
        pilot = measured(longest_batch(table, max(1, batch.num_tokens // PILOT_SHARE), options.batch_size))
        if foretell(None, pilot, batch.num_tokens) > limit:
            # what is not per token weighs much in so small a try: a larger one, and the slope between both
            larger = measured(longest_batch(table, max(1, batch.num_tokens // 2), options.batch_size))
            foretold = foretell(pilot, larger, batch.num_tokens)
            if foretold > limit:  # a processor's memory is not refused but killed for: not tried
                refuse(larger, foretold + optimizer_bytes, limit, options, batch.num_tokens)
        for _ in range(2):
            check_signals()
            result = measured(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = None
    finally:
        adapter.set_rows(None)
        for parameter in trained:
            parameter.grad = None
    if result is None:
        raise MachineError(
            f"out of memory in the probe of {batch.num_tokens:,} tokens", field="micro_batch_size",
            fix="lower micro_batch_size or cutoff_len, or set --gradient_checkpointing",
        )  # fmt: skip
    check_fits(result, limit, options)
    return result


def _step(model: CausalLM, adapter: Adapter, loss: Loss, batch: Batch, seed: int, device: torch.device) -> float:
    """Forward and backward of one micro-batch as the trainer does it; seconds."""
    started = time.perf_counter()
    batch = on_device(rounded_up(batch), device)
    adapter.set_rows(row_keys(seed, 0, batch.example_T, batch.positions_T))
    result = loss(model, batch, max(1, batch.num_supervised))
    result.backward()
    result.item()  # a GPU has only finished once its result is here
    return time.perf_counter() - started


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
    if not options.gradient_checkpointing and checkpointed >= options.cutoff_len:
        size = min(options.micro_batch_size, checkpointed // options.cutoff_len)
        smaller = f" --micro_batch_size {size}" if size < options.micro_batch_size else ""
        return f"set --gradient_checkpointing{smaller} (a third slower, the result stays the same)"
    if tokens >= SHORTEST_CUTOFF:
        return f"set --micro_batch_size 1 --cutoff_len {tokens} (longer rows are cut)"
    return "take a smaller base model or a machine with more memory"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
