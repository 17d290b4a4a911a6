"""Ids of texts to classify: the same in training and when asked, ended by the token that is classified."""

from __future__ import annotations

import numpy as np
import pytest

from alpaca_lora.data.encode import EncodedRow, EncodePolicy
from alpaca_lora.data.encode_labelled import LabelledEncoder, question_ids
from alpaca_lora.errors import DataError, UserError
from alpaca_lora.text.messages import labelled
from tests.data.rows import shown
from tests.tiny import ByteTokenizer

BOS, EOS = 256, 257


def encode(text: str, tokenizer: ByteTokenizer | None = None, **policy) -> EncodedRow:
    encoder = LabelledEncoder(tokenizer or ByteTokenizer(), EncodePolicy(**{"cutoff_len": 32, **policy}))
    return encoder.encode_many([labelled(text, "1", file="f.tsv", line=7)])[0]


@pytest.mark.parametrize(
    ("add_bos", "add_eos_token", "expected"),
    [(True, True, "<s>fine</s>"), (True, False, "<s>fine"), (False, True, "fine</s>"), (False, False, "fine")],
)
def test_the_last_token_is_the_one_that_is_classified(add_bos: bool, add_eos_token: bool, expected: str) -> None:
    row = encode("fine", ByteTokenizer(add_bos=add_bos), add_eos_token=add_eos_token)
    ((ids_T, classified_T),) = row.pieces
    assert shown(ids_T) == expected and ids_T.dtype == np.int32 and row.outcome == "whole"
    assert np.flatnonzero(classified_T).tolist() == [len(ids_T) - 1] and row.ends is None


def test_a_long_text_keeps_its_beginning_and_eos() -> None:
    row = encode("abcdefgh", cutoff_len=6)
    assert row.outcome == "truncated" and shown(row.pieces[0][0]) == "<s>abcd</s>"
    row = encode("abcdefgh", cutoff_len=6, add_eos_token=False)
    assert row.outcome == "truncated" and shown(row.pieces[0][0]) == "<s>abcde"
    assert encode("abcd", cutoff_len=6).outcome == "whole"


def test_over_length_policies() -> None:
    dropped = encode("abcdefgh", cutoff_len=6, over_length="drop")
    assert (dropped.outcome, dropped.reason) == ("dropped", "over_length")
    with pytest.raises(DataError, match=r"f.tsv:7: the row has 10 tokens, expected at most cutoff_len = 6"):
        encode("abcdefgh", cutoff_len=6, over_length="error")


def test_special_tokens_in_a_text_are_text_and_counted() -> None:
    row = encode("a</s>b")
    assert row.spells_special and list(row.pieces[0][0]).count(EOS) == 1
    assert not encode("a").spells_special


def test_a_tokenizer_without_bos_and_eos() -> None:
    bare = ByteTokenizer()
    bare.bos_id = bare.eos_id = None
    row = encode("ab", bare)
    assert row.pieces[0][0].tolist() == [97, 98] and row.pieces[0][1].tolist() == [False, True]


def test_half_a_surrogate_pair_names_its_line() -> None:
    with pytest.raises(DataError, match=r"f.tsv:7: character 1 of turn 0 is half of a surrogate pair"):
        encode("x\ud800")


@pytest.mark.parametrize("cutoff_len", [6, 64])
@pytest.mark.parametrize("add_eos_token", [True, False])
def test_a_question_is_encoded_as_the_rows_were(cutoff_len: int, add_eos_token: bool) -> None:
    policy = EncodePolicy(cutoff_len, add_eos_token=add_eos_token)
    tokenizer = ByteTokenizer()
    (row,) = LabelledEncoder(tokenizer, policy).encode_many([labelled("a fine film", "1")])
    ids, truncated = question_ids(" a fine\x00 film\r\n", tokenizer, policy)  # cleaned as a row is
    assert ids == row.pieces[0][0].tolist() and truncated == (cutoff_len == 6)
    with pytest.raises(UserError, match="the text to classify is empty"):
        question_ids("\x00 \n", tokenizer, policy)


def test_what_says_nothing_about_ids_is_not_in_the_key() -> None:
    tokenizer = ByteTokenizer()
    parts = [
        LabelledEncoder(tokenizer, policy).key_parts()
        for policy in (EncodePolicy(32), EncodePolicy(32, train_on_inputs=False), EncodePolicy(33))
    ]
    assert parts[0] == parts[1] != parts[2]
