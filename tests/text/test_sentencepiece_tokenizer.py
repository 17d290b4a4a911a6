"""``tokenizer.model`` files: the same ids as SentencePiece, and an error where they would not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import sentencepiece_file


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    path = sentencepiece_file(tmp_path_factory.mktemp("spm"))
    return Tokenizer(definition_from_model(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=50))
def test_any_text_gives_sentencepieces_ids(text: str, pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = pair
    if text:  # of an empty text SentencePiece makes nothing, we too, but without the space in front
        assert tokenizer.encode_text(text) == oracle.EncodeAsIds(text)


def test_policy_comes_from_the_file(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = pair
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, None, True)
    assert tokenizer.token_bytes(tokenizer.encode_text("\n")[-1]) == b"\n"


def test_unigram_models(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path, model_type="unigram", vocab_size=330)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer(definition_from_model(path))
    for text in ("The price of a lamp", "灯 12", "a  b\n"):
        assert tokenizer.encode_text(text) == oracle.EncodeAsIds(text)


def test_a_normalization_that_we_do_not_rebuild_is_an_error(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path, normalization_rule_name="nmt_nfkc_cf", remove_extra_whitespaces=True)
    with pytest.raises(ModelFileError, match="normalization is not supported"):
        definition_from_model(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelFileError, match="is not a SentencePiece model"):
        definition_from_model(path)


def test_what_we_save_is_the_same_in_transformers(tmp_path: Path, pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = pair
    tokenizer.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The price", " lead", "灯😀\n x", "a  b"):
        assert oracle(text)["input_ids"] == [1, *tokenizer.encode_text(text)]
        assert oracle.decode(tokenizer.encode_text(text)) == tokenizer.decode(tokenizer.encode_text(text)) == text
