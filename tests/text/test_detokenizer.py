"""Streaming: the pieces joined are the text, and no piece holds half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import byte_level, sentencepiece_file


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    pieces = Tokenizer(definition_from_model(sentencepiece_file(tmp_path_factory.mktemp("spm"))))
    return {"bytes": byte_level(), "pieces": pieces}


def pieces_of(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60),
    kind=st.sampled_from(["bytes", "pieces"]),
)
def test_pieces_joined_are_the_text(text: str, kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    pieces = pieces_of(tokenizer, tokenizer.encode_text(text), at_text_start=True)
    assert "".join(pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_when_it_is_complete() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer, tokenizer.encode_text("😀"))
    assert pieces == ["", "", "", "😀", ""]
    assert pieces_of(tokenizer, tokenizer.encode_text("😀")[:3]) == ["", "", "", "\ufffd"]
    detokenizer = Detokenizer(tokenizer)
    assert [(detokenizer.push(one), detokenizer.is_inside)[1] for one in tokenizer.encode_text("a😀")] == [
        False, True, True, True, False,
    ]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_any_ids_give_what_decode_gives(ids: list[int], tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_silent_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode_text("on"), tokenizer.special_tokens["<|im_end|>"], *tokenizer.encode_text("off")]
    assert "".join(pieces_of(tokenizer, ids)) == "onoff"
    assert "".join(pieces_of(tokenizer, ids, skip_special=False)) == "on<|im_end|>off"


def test_the_space_of_an_answer_is_real(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["pieces"]
    ids = tokenizer.encode_text("price")
    assert "".join(pieces_of(tokenizer, ids)) == " price"
    assert "".join(pieces_of(tokenizer, ids, at_text_start=True)) == "price"
