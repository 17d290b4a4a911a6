"""What the loop does to a micro-batch besides training on it: round it up, move it, halve it, describe it."""

from __future__ import annotations

import dataclasses

import torch

from alpaca_lora.data.examples import Batch, StepBatch
from alpaca_lora.data.packing import ROUND_TO


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; itself where they are there already."""
    if batch.ids_T.device == device:
        return batch
    moved = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


def rounded_up(batch: Batch) -> Batch:
    """The batch with a last segment that nothing learns from, so that its tokens are a multiple of `ROUND_TO`.

    No other segment sees it; it is not a row, and whoever counts tokens counts them before.
    """
    missing = -batch.num_tokens % ROUND_TO
    if not missing:
        return batch
    nothing = torch.zeros(missing, dtype=torch.int64)
    return dataclasses.replace(
        batch,
        ids_T=torch.cat((batch.ids_T, nothing)),
        positions_T=torch.cat((batch.positions_T, torch.arange(missing))),
        lengths=(*batch.lengths, missing),
        example_T=torch.cat((batch.example_T, nothing)),
    )


def halve(batch: Batch) -> tuple[Batch, Batch]:
    """Cut the stream between two segments, as near to the middle as they allow. Needs at least two segments."""
    assert len(batch.lengths) > 1
    borders = torch.tensor(batch.lengths).cumsum(0)[:-1]
    segment = int((borders - batch.num_tokens / 2).abs().argmin()) + 1
    border = int(borders[segment - 1])
    return _cut(batch, slice(0, segment), 0, border), _cut(batch, slice(segment, None), border, batch.num_tokens)


def _cut(batch: Batch, segments: slice, start: int, end: int) -> Batch:
    inside_N = (batch.label_rows_N >= start) & (batch.label_rows_N < end)
    return Batch(
        ids_T=batch.ids_T[start:end],
        positions_T=batch.positions_T[start:end],
        lengths=batch.lengths[segments],
        label_rows_N=batch.label_rows_N[inside_N] - start,
        label_ids_N=batch.label_ids_N[inside_N],
        example_T=batch.example_T[start:end],
        indices=batch.indices[segments],
    )


def shrink(step_batch: StepBatch, max_tokens: int) -> StepBatch:
    """The same optimizer batch in micro-batches of at most ``max_tokens``, as far as their segments allow."""
    pending, done = list(reversed(step_batch.micro_batches)), []
    while pending:
        batch = pending.pop()
        if batch.num_tokens > max_tokens and len(batch.lengths) > 1:
            pending.extend(reversed(halve(batch)))
        else:
            done.append(batch)
    return dataclasses.replace(step_batch, micro_batches=tuple(done))


def describe(batch: Batch) -> dict[str, object]:
    """What is written of a batch that gave a loss or gradient which is not finite: the rows and their token ids."""
    return {
        "rows": list(batch.indices),
        "lengths": list(batch.lengths),
        "ids": batch.ids_T.tolist(),
        "label_rows": batch.label_rows_N.tolist(),
    }


# the CPU allocator has two wordings, for a refusal by the system and for one by a limit; the last is of GPUs
_WORDS = ("not enough memory", "DefaultCPUAllocator: can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch's or Python's way to say that memory ran out (on a CPU torch raises a plain
    RuntimeError).
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)
