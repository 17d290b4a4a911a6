"""One call is one step: decoding, going on and beginning together say what each full forward says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alpaca_lora.inference.block_pool import BlockPool
from alpaca_lora.inference.block_table import BlockTable
from alpaca_lora.inference.kv_cache import KVCache
from alpaca_lora.inference.request import Request
from alpaca_lora.inference.runner import Runner
from alpaca_lora.inference.scheduler import Chunk
from alpaca_lora.inference.sequence import Sequence
from alpaca_lora.inference.step_batch import StepBatch
from alpaca_lora.models.attention import Packed
from tests.tiny import ByteTokenizer, tiny_model

TOKENIZER: Any = ByteTokenizer()
CPU = torch.device("cpu")


@torch.inference_mode()
def test_steps_equal_full_forwards() -> None:
    model = tiny_model(windows=(7, None))
    pool = BlockPool(20)
    runner = Runner(model, KVCache(model.config, 20, dtype=torch.float32, device=CPU))
    sequences = []
    for index, length in enumerate((30, 21, 9)):
        table = BlockTable(pool)
        table.reserve(length)
        prompt = tuple(range(100 * index % 250, 100 * index % 250 + length))
        sequences.append(Sequence(index, Request(prompt), TOKENIZER, table, max_tokens=5, device=CPU))
    first, second, third = sequences
    steps = [
        [Chunk(first, 0, 29), Chunk(second, 0, 5)],
        [Chunk(first, 29, 1), Chunk(second, 5, 7), Chunk(third, 0, 9)],
        [Chunk(second, 12, 9)],
    ]
    asked = [[], [first, third], [second]]
    for chunks, wanted in zip(steps, asked, strict=True):
        batch = StepBatch.of(chunks)
        found = runner.run(batch)
        assert batch.token_sequences == wanted and found.tokens_NV.shape == (len(wanted), 264) and found.classes == []
        for sequence, logits_V in zip(wanted, found.tokens_NV, strict=True):
            ids = sequence.request.prompt_ids
            hidden_TD = model(torch.tensor(ids), torch.arange(len(ids)), Packed([len(ids)]))
            torch.testing.assert_close(logits_V, model.logits(hidden_TD[-1]), atol=1e-5, rtol=1e-5)


def steps_of(model: Any, lengths: list[int]) -> tuple[torch.Tensor, KVCache]:
    """Logits behind prompts that are read in one step."""
    pool = BlockPool(40)
    cache = KVCache(model.config, 40, dtype=torch.bfloat16, device=CPU)
    chunks = []
    for index, length in enumerate(lengths):
        table = BlockTable(pool)
        table.reserve(length)
        request = Request(tuple((7 * index + place) % 250 for place in range(length)))
        chunks.append(Chunk(Sequence(index, request, TOKENIZER, table, max_tokens=5, device=CPU), 0, length))
    return Runner(model, cache).run(StepBatch.of(chunks)).tokens_NV, cache


@pytest.mark.parametrize("lengths", [[33], [70, 1, 58], [129], [20, 180]])
@torch.inference_mode()
def test_rows_for_nobody_fill_a_step_up_and_change_nothing(lengths: list[int], monkeypatch: Any) -> None:
    model = tiny_model().to(torch.bfloat16)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    found, cache = steps_of(model, lengths)
    monkeypatch.setattr(Runner, "_num_idle", lambda self, num_rows: 0)
    plain, untouched = steps_of(model, lengths)
    hook.remove()
    assert seen[0] % (16 if sum(lengths) <= 128 else 64) == 0 and 0 < seen[0] - sum(lengths) < 64
    assert seen[1] == sum(lengths)
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.05)  # the products may round otherwise
    for one, other in zip(cache.keys, untouched.keys, strict=True):
        assert torch.equal(one == 0, other == 0)  # nothing is stored of them


def test_only_steps_in_bfloat16_are_filled_up() -> None:
    model = tiny_model()
    runner = Runner(model, KVCache(model.config, 2, dtype=torch.bfloat16, device=CPU))
    assert [runner._num_idle(count) for count in (1, 32, 33, 48, 128, 129, 192, 2048)] == [0, 0, 15, 0, 0, 63, 0, 0]
    plain = Runner(model, KVCache(model.config, 2, dtype=torch.float32, device=CPU))
    assert plain._num_idle(33) == 0


def test_the_bank_is_told_whose_rows_come() -> None:
    told = []

    class Bank:
        def set_rows(self, rows: Any) -> None:
            told.append(list(rows))

        def select_rows(self, places: Any) -> None:
            told.append(places)

    model, bank, adapter = tiny_model(), Bank(), object()
    runner = Runner(model, KVCache(model.config, 4, dtype=torch.float32, device=CPU), bank)  # pyright: ignore
    table = BlockTable(BlockPool(4))
    table.reserve(3)
    one = Sequence(
        0,
        Request((1, 2, 3)),
        TOKENIZER,
        table,
        max_tokens=5,
        device=CPU,
        adapter=adapter,  # pyright: ignore
    )
    runner.run(StepBatch.of([Chunk(one, 0, 3)]))
    # of three rows the head is asked for the last
    assert told == [[(adapter, 3)], [2]]
