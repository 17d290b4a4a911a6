from __future__ import annotations

import dataclasses

import pytest
import torch

from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.micro_batch import (
    ROUND_TO,
    describe,
    halve,
    is_out_of_memory,
    on_device,
    rounded_up,
    shrink,
)
from tests.tiny import tiny_model
from tests.training.tiny_run import table


def same(a: Batch, b: Batch) -> bool:
    tensors = ("ids_T", "positions_T", "label_rows_N", "label_ids_N", "example_T")
    return (
        all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)
        and a.lengths == b.lengths
        and a.indices == b.indices
    )


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_the_halves_are_what_packing_them_apart_gives(count: int) -> None:
    rows = table()[:count]
    left, right = halve(Batch.pack(rows))
    cut = len(left.lengths)
    assert 0 < cut < count
    assert same(left, Batch.pack(rows[:cut])) and same(right, Batch.pack(rows[cut:]))


def test_halves_are_as_even_as_the_segments_allow() -> None:
    left, right = halve(Batch.pack(table((10, 10, 10, 30))))
    assert (left.num_tokens, right.num_tokens) == (30, 30)


def test_shrink_keeps_the_optimizer_batch() -> None:
    rows = table()
    whole = StepBatch(3, 1, (Batch.pack(rows[:6]), Batch.pack(rows[6:])))
    small = shrink(whole, 20)
    assert (small.step, small.epoch) == (3, 1)
    assert small.num_supervised == whole.num_supervised
    assert [i for b in small.micro_batches for i in b.indices] == [i for b in whole.micro_batches for i in b.indices]
    assert all(b.num_tokens <= 20 or len(b.lengths) == 1 for b in small.micro_batches)
    assert shrink(whole, 10_000) == whole


def test_on_device_is_free_where_nothing_moves() -> None:
    batch = Batch.pack(table()[:2])
    assert on_device(batch, torch.device("cpu")) is batch
    moved = on_device(batch, torch.device("meta"))
    assert moved.ids_T.device.type == moved.label_rows_N.device.type == "meta" and moved.lengths == batch.lengths


def test_describe_is_json_of_the_rows() -> None:
    batch = Batch.pack(table()[:2])
    assert describe(batch)["rows"] == [0, 1]
    assert describe(batch)["ids"] == batch.ids_T.tolist()


def test_what_out_of_memory_looks_like() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_a_real_allocation_that_is_too_large_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_rounding_up_changes_no_row_and_no_loss() -> None:
    batch = Batch.pack(table())
    stream = rounded_up(batch)
    assert stream.num_tokens % ROUND_TO == 0 and 0 < stream.num_tokens - batch.num_tokens < ROUND_TO
    assert (stream.indices, stream.num_supervised) == (batch.indices, batch.num_supervised)
    assert sum(stream.lengths) == stream.num_tokens
    model = tiny_model()
    with torch.no_grad():
        losses = [causal_lm_loss(model, one, batch.num_supervised) for one in (batch, stream)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert rounded_up(stream) is stream


def labelled_rows() -> list[TokenizedExample]:
    return [dataclasses.replace(row, label=row.index % 3) for row in table()]


def test_texts_to_classify_are_halved_shrunk_and_rounded_up_with_their_classes() -> None:
    rows = labelled_rows()
    whole = Batch.pack(rows)
    left, right = halve(whole)
    cut = len(left.lengths)
    assert same(left, Batch.pack(rows[:cut])) and same(right, Batch.pack(rows[cut:]))
    small = shrink(StepBatch(0, 0, (whole,)), 20)
    assert small.num_supervised == len(rows) and len(small.micro_batches) > 3
    assert all(batch.num_supervised == len(batch.lengths) for batch in small.micro_batches)
    stream = rounded_up(whole)
    assert stream.num_tokens % ROUND_TO == 0 and stream.num_tokens > whole.num_tokens
    assert torch.equal(stream.label_rows_N, whole.label_rows_N) and stream.num_supervised == len(rows)
