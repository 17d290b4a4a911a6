"""Each penalty against its formula, written out; the table of counts against a counter."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from alpaca_lora.inference.penalties import TokenCounts, penalize_repeated_, penalize_said_

CPU = torch.device("cpu")


def logits(seed: int, vocab_size: int = 300) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def test_repetition_penalty_equals_transformers() -> None:
    seen = [3, 5, 5, 200]
    theirs_V = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits(1)[None])[0]
    ours_V = logits(1)
    penalize_repeated_(ours_V, TokenCounts(seen, CPU).ids_N, 1.3)
    torch.testing.assert_close(ours_V, theirs_V)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-2.0, 0.25), (2.0, -1.0)])
def test_presence_and_frequency_are_the_formula(presence: float, frequency: float) -> None:
    said = [7, 2, 7, 7, 299, 0]
    ours_V = logits(2)
    penalize_said_(ours_V, TokenCounts(said, CPU), presence, frequency)
    for token_id, before in enumerate(logits(2).tolist()):
        count = said.count(token_id)
        after = before - count * frequency - (count > 0) * presence
        assert ours_V[token_id] == pytest.approx(after, abs=1e-5), token_id


def test_counts_are_a_counter_whatever_the_order_and_number() -> None:
    rng = random.Random(0)
    first = rng.choices(range(1000), k=100)
    table, counter = TokenCounts(first, CPU), Counter(first)
    for token_id in rng.choices(range(1000), k=600):  # more different ones than the first table has places
        table.add(token_id)
        counter[token_id] += 1
    assert dict(zip(table.ids_N.tolist(), table.counts_N.tolist(), strict=True)) == counter


def test_a_table_that_begins_empty() -> None:
    table = TokenCounts((), CPU)
    ours_V = logits(3)
    penalize_said_(ours_V, table, 2.0, 2.0)
    assert torch.equal(ours_V, logits(3))
    table.add(4)
    assert (table.ids_N.tolist(), table.counts_N.tolist()) == ([4], [1.0])
