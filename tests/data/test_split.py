"""The validation split: by hash, whole groups, clamped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from alpaca_lora.data.split import choose_validation, normalised_hash, piece_hash, row_hash
from alpaca_lora.text.messages import Conversation, Message, instruction, labelled

HASHES = arrays.arrays(np.uint64, st.integers(0, 60), elements=st.integers(0, 20))
SIZES = st.integers(0, 80) | st.floats(0, 1, exclude_max=True)


@given(HASHES, SIZES)
def test_equal_rows_are_on_one_side_and_training_keeps_some(hash_N: np.ndarray, size: float) -> None:
    is_val_N, _ = choose_validation(hash_N, size)
    assert not set(hash_N[is_val_N]) & set(hash_N[~is_val_N])
    assert (~is_val_N).any() or not len(hash_N)
    if len(set(hash_N)) > 1 and size > 0:
        assert is_val_N.any()
    else:
        assert not is_val_N.any()


@given(st.integers(2, 500), SIZES.filter(bool), st.randoms(use_true_random=False))
def test_rows_that_all_differ_give_the_exact_count(num_rows: int, size: float, random) -> None:
    hash_N = np.array(random.sample(range(10**6), num_rows), dtype=np.uint64)
    is_val_N, told = choose_validation(hash_N, size)
    if size < 0.5:
        assert is_val_N.sum() == max(1, round(num_rows * size)) and told is None
    elif 1 <= size < num_rows / 2:
        assert is_val_N.sum() == size and told is None
    else:
        assert is_val_N.sum() == max(1, num_rows // 10) and told is not None


@given(HASHES, SIZES, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(hash_N: np.ndarray, size: float, random) -> None:
    order = np.array(random.sample(range(len(hash_N)), len(hash_N)), dtype=np.int64)
    is_val_N, _ = choose_validation(hash_N, size)
    assert (choose_validation(hash_N[order], size)[0] == is_val_N[order]).all()


def test_a_few_rows_more_hardly_move_the_others() -> None:
    rng = np.random.default_rng(0)
    hash_N = rng.integers(0, 2**63, 10_000, dtype=np.uint64)
    before, _ = choose_validation(hash_N, 1000)
    after, _ = choose_validation(np.append(hash_N, rng.integers(0, 2**63, 100, dtype=np.uint64)), 1000)
    assert (before != after[:10_000]).sum() < 40


def test_small_sets_are_clamped_with_a_message() -> None:
    is_val_N, told = choose_validation(np.arange(30, dtype=np.uint64), 2000)
    assert is_val_N.sum() == 3 and told is not None and "val_set_size 2,000" in told and "3 (10 %)" in told
    is_val_N, told = choose_validation(np.arange(30, dtype=np.uint64), 0.5)
    assert (
        is_val_N.sum() == 3 and told == "val_set_size 0.5 is half of the 30 examples or more: 3 (10 %) validate instead"
    )
    is_val_N, told = choose_validation(np.arange(30, dtype=np.uint64), 0.4)
    assert is_val_N.sum() == 12 and told is None
    is_val_N, told = choose_validation(np.arange(1, dtype=np.uint64), 2000)
    assert not is_val_N.any() and told is not None and "validation is off" in told
    is_val_N, told = choose_validation(np.zeros(9, dtype=np.uint64), 3)
    assert not is_val_N.any() and told is not None and "all examples are the same" in told
    assert choose_validation(np.arange(30, dtype=np.uint64), 0) == (pytest.approx(np.zeros(30)), None)


def test_hashes() -> None:
    row = instruction("Name a fruit.", "", "Apple, ripe.", file="a", line=1)
    same = instruction("Name a fruit.", "", "Apple, ripe.", file="b", line=9)
    near = instruction("name a fruit", "", "Apple ripe!")
    other = instruction("Name a fruit.", "Apple, ripe.", "")
    assert row_hash(row) == row_hash(same) != row_hash(near)
    assert normalised_hash(row) == normalised_hash(near) != normalised_hash(other)
    assert len({normalised_hash(instruction("Say", "", text)) for text in ("!", "?", "÷", "é", "E")}) == 5
    chat = Conversation((Message("user", "a"), Message("assistant", "b")), "chat", "", 0)
    assert row_hash(chat) != row_hash(instruction("a", "", "b"))
    assert piece_hash(5, 0) == 5 and len({piece_hash(5, 1), piece_hash(5, 2), piece_hash(6, 1), 5}) == 4


@given(st.text(st.characters(codec="ascii")))
def test_the_quick_way_for_ascii_gives_the_same_words(text: str) -> None:
    """An added letter that is not ASCII takes the other way: the words are the same but for it."""
    from alpaca_lora.data.split import _words

    assert _words(text) + "é" == _words(text + "é")


def test_a_labelled_row_is_told_by_its_text_alone() -> None:
    one, other = labelled("Fine!", "pos"), labelled("Fine!", "neg")
    assert row_hash(one) == row_hash(other) != row_hash(labelled("fine", "pos"))
    assert normalised_hash(one) == normalised_hash(labelled("fine", "pos"))
    assert row_hash(one) != row_hash(instruction("Fine!", "", "pos"))
