"""A step in stream order: each adapter's rows are one run, and the rows that are asked are the last of theirs."""

from __future__ import annotations

from typing import Any

import torch

from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import VIRTUAL, BlockTable
from alpaca_lora.inference.request import Request
from alpaca_lora.inference.scheduler import Chunk
from alpaca_lora.inference.sequence import Sequence
from alpaca_lora.inference.step_batch import StepBatch
from tests.tiny import ByteTokenizer

TOKENIZER: Any = ByteTokenizer()
POOL = BlockPool(50, 4)


def sequence(index: int, num_tokens: int, adapter: Any = None, *, num_virtual: int = 0, **more: Any) -> Sequence:
    table = BlockTable(POOL, reuse=False)
    table.reserve(num_virtual + num_tokens)
    prompt = tuple(range(10 * index, 10 * index + num_tokens))
    return Sequence(
        index, Request(prompt, **more), TOKENIZER, table, max_tokens=5, device=torch.device("cpu"), adapter=adapter,
        num_virtual=num_virtual,
    )  # fmt: skip


def test_rows_are_sorted_by_adapter_in_the_order_in_which_they_come() -> None:
    a, b = object(), object()
    chunks = [
        Chunk(sequence(0, 3), 0, 3), Chunk(sequence(1, 5, a), 4, 1), Chunk(sequence(2, 4), 1, 2),
        Chunk(sequence(3, 2, b), 0, 2), Chunk(sequence(4, 6, a, num_virtual=2), 2, 6),
        Chunk(sequence(5, 3, a, kind="classify"), 0, 3),
    ]  # fmt: skip
    batch = StepBatch.of(chunks)
    assert batch.ids == [0, 1, 2, 21, 22, 14, *range(40, 46), 50, 51, 52, 30, 31]
    assert batch.positions == [0, 1, 2, 1, 2, 4, *range(2, 8), 0, 1, 2, 0, 1]
    assert batch.adapters == [(None, 5), (a, 10), (b, 2)]
    assert [(s.start, s.count) for s in batch.segments] == [(0, 3), (1, 2), (4, 1), (2, 6), (0, 3), (0, 2)]
    assert [(row, s.index) for row, s in zip(batch.token_rows, batch.token_sequences, strict=True)] == [
        (2, 0), (5, 1), (11, 4), (16, 3),
    ]  # fmt: skip
    assert (batch.class_rows, [s.index for s in batch.class_sequences]) == ([14], [5])


def test_positions_leave_out_what_the_model_adds_itself() -> None:
    one = sequence(0, 3, num_virtual=4)
    assert one.ids == [VIRTUAL] * 4 + [0, 1, 2]
    assert StepBatch.of([Chunk(one, 4, 3)], first_position=4).positions == [0, 1, 2]
