"""Ids of texts to classify: the same in training and when asked, ended by the token that is classified."""

from __future__ import annotations

import numpy as np
import pytest

from alpaca_lora.data.encode import EncodedRow, EncodePolicy
from alpaca_lora.data.encode_labelled import LabelledEncoder, question_ids
from alpaca_lora.data.options import DataOptions
from alpaca_lora.errors import ConfigError, DataError, UserError
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
    asked = question_ids([" a fine\x00 film\r\n", "\x00 \n", "", "a"], tokenizer, policy)  # cleaned as a row is
    assert asked[:3] == [(row.pieces[0][0].tolist(), cutoff_len == 6), None, None]
    assert asked[3] == question_ids(["a"], tokenizer, policy)[0] != asked[0]


def test_a_question_is_cleaned_as_its_training_was() -> None:
    policy, tokenizer = EncodePolicy(64, add_eos_token=False), ByteTokenizer()
    whole = question_ids([" a\x00b "], tokenizer, policy, ["all"])
    assert whole == [([BOS, *b" a\x00b "], False)]
    assert question_ids([" a\x00b "], tokenizer, policy, ["control_characters"]) == [([BOS, *b"a\x00b"], False)]
    assert question_ids([" ", ""], tokenizer, policy, ["all"]) == [None, None]
    with pytest.raises(UserError, match="half of a surrogate pair is no text"):
        question_ids(["x\ud800"], tokenizer, policy, ["all"])


@pytest.mark.parametrize(
    ("add_bos", "add_eos_token", "cutoff_len", "beside"),
    [(True, True, 2, "BOS and EOS"), (True, False, 1, "BOS"), (False, True, 1, "EOS")],
)
def test_a_cutoff_that_leaves_no_room_for_a_text_is_refused(
    add_bos: bool, add_eos_token: bool, cutoff_len: int, beside: str
) -> None:
    tokenizer = ByteTokenizer(add_bos=add_bos)
    message = f"cutoff_len: {cutoff_len} leaves no room for a text beside {beside}, expected at least {cutoff_len + 1}"
    with pytest.raises(ConfigError, match=message):
        LabelledEncoder(tokenizer, EncodePolicy(cutoff_len, add_eos_token=add_eos_token))
    with pytest.raises(ConfigError, match=message):
        question_ids(["a"], tokenizer, EncodePolicy(cutoff_len, add_eos_token=add_eos_token))
    row = encode("ab", tokenizer, cutoff_len=cutoff_len + 1, add_eos_token=add_eos_token)
    assert len(row.pieces[0][0]) == cutoff_len + 1 and row.outcome == "truncated"


def test_a_text_without_tokens_is_dropped_though_bos_stands_there() -> None:
    row = encode("")
    assert (row.outcome, row.reason, row.pieces) == ("dropped", "no_token", ())


def test_what_says_nothing_about_ids_is_not_in_the_key() -> None:
    tokenizer = ByteTokenizer()
    parts = [
        LabelledEncoder(tokenizer, policy).key_parts()
        for policy in (EncodePolicy(32), EncodePolicy(32, train_on_inputs=False), EncodePolicy(33))
    ]
    assert parts[0] == parts[1] != parts[2]


def test_a_template_stands_around_the_text_and_its_end_is_read() -> None:
    template = "Review: {text}. Mood:"
    encoder = LabelledEncoder(
        ByteTokenizer(add_bos=False), EncodePolicy(64, add_eos_token=False, text_template=template)
    )
    (row,) = encoder.encode_many([labelled("a {text} <eos>", "good")])
    (piece,) = row.pieces
    assert bytes(piece[0].tolist()) == b"Review: a {text} <eos>. Mood:"
    assert piece[1].tolist() == [False] * (len(piece[0]) - 1) + [True]
    asked = question_ids(["a {text} <eos>"], encoder.tokenizer, encoder.policy)
    assert asked == [(piece[0].tolist(), False)]


def test_a_long_text_is_cut_and_the_end_of_the_template_stays() -> None:
    policy = EncodePolicy(20, add_eos_token=False, text_template="R: {text} Mood:")
    encoder = LabelledEncoder(ByteTokenizer(add_bos=False), policy)
    (row,) = encoder.encode_many([labelled("0123456789" * 9, "good")])
    assert row.outcome == "truncated" and bytes(row.pieces[0][0].tolist()) == b"R: 01234567890 Mood:"
    with pytest.raises(ConfigError, match="cutoff_len: 9 leaves no room for a text beside text_template"):
        LabelledEncoder(
            ByteTokenizer(add_bos=False), EncodePolicy(9, add_eos_token=False, text_template="R: {text} Mood:")
        )


@pytest.mark.parametrize("template", ["no text", "{text} {text}", "{text"])
def test_a_template_says_once_where_the_text_stands(template: str) -> None:
    with pytest.raises(ConfigError, match="text_template"):
        DataOptions(data_path=["d"], task="classification", text_template=template)
