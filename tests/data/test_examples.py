"""Micro-batches: one stream, labels shifted in one place."""

from __future__ import annotations

import numpy as np

from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample


def example(index: int, ids: list[int], supervised: list[int]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool), index)


def test_labels_are_the_next_tokens_and_none_crosses_a_border() -> None:
    batch = Batch.pack([example(5, [10, 11, 12], [1, 0, 1]), example(9, [20, 21], [1, 1])])
    assert batch.ids_T.tolist() == [10, 11, 12, 20, 21] and batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == (3, 2) and batch.indices == (5, 9) and batch.example_T.tolist() == [5, 5, 5, 9, 9]
    # 20 is marked as learned, but its segment begins with it: no token before it may predict it
    assert batch.label_rows_N.tolist() == [1, 3] and batch.label_ids_N.tolist() == [12, 21]
    assert batch.num_supervised == 2 and batch.num_tokens == 5


def test_packing_does_not_change_the_examples() -> None:
    one = example(0, [1, 2], [1, 1])
    Batch.pack([one])
    assert one.supervised_T.tolist() == [True, True]


def test_a_step_adds_up_its_micro_batches() -> None:
    batches = tuple(Batch.pack([example(i, [1, 2, 3], [0, 1, 1])]) for i in range(4))
    step = StepBatch(step=7, epoch=1, micro_batches=batches)
    assert (step.num_examples, step.num_tokens, step.num_supervised) == (4, 12, 8)


def test_a_text_to_classify_has_its_class_at_its_last_token() -> None:
    texts = [(5, [10, 11, 12], 1), (9, [20], 0), (2, [30, 31], 2)]
    rows = [TokenizedExample(np.array(ids, np.int32), np.zeros(len(ids), bool), i, c) for i, ids, c in texts]
    batch = Batch.pack(rows)
    assert batch.label_rows_N.tolist() == [2, 3, 5] and batch.label_ids_N.tolist() == [1, 0, 2]
    assert batch.num_supervised == 3 and batch.num_tokens == 6 and batch.lengths == (3, 1, 2)
    assert [one.num_supervised for one in rows] == [1, 1, 1]
