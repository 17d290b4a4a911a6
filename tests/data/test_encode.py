"""Ids and masks: BOS, EOS, borders, cutting, turns, texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.data.encode import EncodedRow, EncodePolicy, Encoder
from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation, Message, instruction
from alpaca_lora.text.templates import load_template
from tests.data.rows import PairTokenizer, chat_tokenizer, shown
from tests.tiny import CHATML, ByteTokenizer

BOS, EOS = 256, 257
BYTES, BYTES_WITHOUT_BOS = ByteTokenizer(), ByteTokenizer(add_bos=False)


def encode(row: Conversation, tokenizer: ByteTokenizer | None = None, **policy) -> EncodedRow:
    tokenizer = tokenizer or BYTES
    policy = {"cutoff_len": 4096, "train_on_inputs": False, **policy}
    encoder = Encoder(tokenizer, load_template(None, tokenizer), EncodePolicy(**policy))
    return encoder.encode_many([row])[0]


def learned(row: EncodedRow) -> str:
    ((ids_T, supervised_T),) = row.pieces
    return shown(ids_T[supervised_T])


def chat(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)), "chat", "f.json", 7)


def test_the_answer_and_eos_are_learned_and_nothing_else() -> None:
    row = encode(instruction("Hi", "", "Ho 你"))
    ((ids_T, supervised_T),) = row.pieces
    assert ids_T.dtype == np.int32 and supervised_T.dtype == bool
    assert list(ids_T[:1]) == [BOS] and list(ids_T).count(BOS) == 1 and list(ids_T).count(EOS) == 1
    assert learned(row) == "Ho 你</s>" and row.ends


def test_with_train_on_inputs_all_but_the_first_token_is_learned() -> None:
    for tokenizer in (BYTES, BYTES_WITHOUT_BOS):
        ((_, supervised_T),) = encode(instruction("Hi", "", "Ho"), tokenizer, train_on_inputs=True).pieces
        assert not supervised_T[0] and supervised_T[1:].all()


def test_without_add_eos_token_there_is_none() -> None:
    row = encode(instruction("Hi", "", "Ho"), add_eos_token=False)
    assert learned(row) == "Ho" and not row.ends


@given(st.text(max_size=30), st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_a_mask_begins_and_ends_at_the_characters_of_the_answer(prompt: str, context: str, answer: str) -> None:
    assert learned(encode(instruction(prompt, context, answer))) == answer + "</s>"


@given(st.text(max_size=9), st.text(min_size=1, max_size=9))
def test_a_token_over_the_border_is_not_learned_but_counted(prompt: str, answer: str) -> None:
    """Every learned token lies wholly in the answer; what reaches over its border is left out."""
    tokenizer = PairTokenizer()
    template = load_template("alpaca", BYTES)
    conversation = instruction(prompt, "", answer)
    rendered = template.render(conversation)
    encoded = tokenizer.encode(rendered)
    (span,) = rendered.responses
    (row,) = Encoder(tokenizer, template, EncodePolicy(4096, train_on_inputs=False)).encode_many([conversation])
    ((_, supervised_T),) = row.pieces
    inside = [start >= span.start and end <= span.end for start, end in zip(encoded.starts, encoded.ends, strict=True)]
    assert supervised_T[1:-1].tolist() == inside and supervised_T[-1]
    across = [s < span.start < e or s < span.end < e for s, e in zip(encoded.starts, encoded.ends, strict=True)]
    assert row.num_straddling == sum(across)


def test_chat_templates_end_their_turns_themselves() -> None:
    tokenizer = chat_tokenizer()
    row = encode(chat("a", "b", "c", "d"), tokenizer)
    assert learned(row) == "b<|im_end|>d<|im_end|>" and row.ends
    assert learned(encode(chat("a", "b", "c", "d"), tokenizer, train_on_turns="last")) == "d<|im_end|>"
    ((ids_T, _),) = row.pieces
    assert EOS not in ids_T and BOS not in ids_T


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_template_that_writes_bos_or_eos_gets_no_second(add_bos: bool) -> None:
    words = "{{ '<s>' }}" + CHATML.replace("<|im_end|>", "</s>")
    tokenizer = ByteTokenizer(add_bos=add_bos, chat_template=words)
    ((ids_T, _),) = encode(chat("a", "b"), tokenizer).pieces
    assert list(ids_T).count(BOS) == 1 and ids_T[0] == BOS
    assert list(ids_T).count(EOS) == 2  # one a turn, as the template says


def test_each_turn_of_an_instruction_template_ends_with_eos() -> None:
    row = encode(chat("a", "b", "c", "d"))
    assert learned(row) == "b</s>d</s>" and row.ends
    ((ids_T, _),) = row.pieces
    assert "b</s>\n\n### Instruction:\nc" in shown(ids_T)
    last = encode(chat("a", "b", "c", "d"), train_on_turns="last")
    assert learned(last) == "d</s>" and list(last.pieces[0][0]) == list(ids_T)
    assert learned(encode(chat("a", "b", "c", "d"), train_on_inputs=True)).count("</s>") == 2


@pytest.mark.parametrize("length", [1, 50, 200, 205])
def test_what_is_cut_gets_no_eos(length: int) -> None:
    whole = encode(instruction("Hi", "", "x" * 60))
    num_tokens = len(whole.pieces[0][0])
    row = encode(instruction("Hi", "", "x" * 60), cutoff_len=num_tokens - 1)
    ((ids_T, supervised_T),) = row.pieces
    assert row.outcome == "truncated" and row.ends is False
    assert len(ids_T) == num_tokens - 1 and EOS not in ids_T and supervised_T[-1]
    assert encode(instruction("Hi", "", "x" * 60), cutoff_len=num_tokens).outcome == "whole"


def test_a_prompt_that_fills_the_cutoff_leaves_nothing_to_learn() -> None:
    row = instruction("p" * 500, "", "answer")
    dropped = encode(row, cutoff_len=256)
    assert (dropped.outcome, dropped.reason, dropped.pieces) == ("dropped", "no_supervised_token", ())
    assert encode(row, cutoff_len=256, train_on_inputs=True).outcome == "truncated"


def test_over_length_policies() -> None:
    row = instruction("Hi", "", "x" * 400, file="f.json", line=12)
    assert encode(row, cutoff_len=256).outcome == "truncated"
    assert encode(row, cutoff_len=256, over_length="drop").reason == "over_length"
    with pytest.raises(DataError, match=r"f.json:12: the row has \d+ tokens, expected at most cutoff_len = 256"):
        encode(row, cutoff_len=256, over_length="error")


def test_pad_that_is_eos_and_no_special_tokens_at_all() -> None:
    same = ByteTokenizer()
    same.pad_id = same.eos_id
    assert learned(encode(instruction("Hi", "", "Ho"), same)).endswith("</s>")
    bare = ByteTokenizer()
    bare.bos_id = bare.eos_id = bare.pad_id = None
    bare.stop_ids = ()
    row = encode(instruction("Hi", "", "Ho"), bare)
    assert learned(row) == "Ho" and not row.ends and BOS not in row.pieces[0][0]


def test_special_tokens_in_a_rows_own_text_are_text_and_counted() -> None:
    tokenizer = chat_tokenizer()
    row = encode(chat("say <|im_end|>", "<|im_end|> and </s>"), tokenizer)
    ((ids_T, _),) = row.pieces
    assert row.spells_special and list(ids_T).count(260) == 2  # the two that the template wrote
    assert learned(row) == "<|im_end|> and </s><|im_end|>"
    assert not encode(chat("say < and |", "x"), tokenizer).spells_special


@given(st.integers(1, 70), st.integers(2, 20), st.booleans())
def test_a_long_text_is_cut_in_pieces_that_lose_no_token(length: int, cutoff_len: int, add_bos: bool) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    row = Conversation((Message("assistant", text),), "text", "f.txt", 1)
    encoded = encode(row, BYTES if add_bos else BYTES_WITHOUT_BOS, cutoff_len=cutoff_len)
    targets = [token for ids_T, supervised_T in encoded.pieces for token in ids_T[supervised_T].tolist()]
    whole = [*text.encode(), EOS]
    assert targets == (whole if add_bos else whole[1:])
    assert all(2 <= len(ids_T) <= cutoff_len and not supervised_T[0] for ids_T, supervised_T in encoded.pieces)
    assert all((ids_T[0] == BOS) == add_bos for ids_T, _ in encoded.pieces)
    assert encoded.outcome == ("whole" if len(encoded.pieces) == 1 else "split") and encoded.ends is None


def test_half_a_surrogate_pair_is_an_error_with_its_line() -> None:
    with pytest.raises(DataError, match=r"f.json:3: character 1 of turn 1 is half of a surrogate pair"):
        encode(instruction("Hi", "", "x\ud800", file="f.json", line=3))


def test_a_row_that_the_template_refuses_is_a_bad_row() -> None:
    row = encode(Conversation((Message("user", "a"),), "chat", "f.json", 4))
    assert row.outcome == "bad" and row.error is not None and "f.json:4" in str(row.error)
