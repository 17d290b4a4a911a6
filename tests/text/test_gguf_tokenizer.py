"""Tokenizers rebuilt from GGUF keys: the same ids as the tokenizer that the keys were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.gguf_tokenizer import PRE_TOKENIZERS
from tests.text.tiny_tokenizers import (
    byte_level_backend,
    from_fields,
    gguf_fields_of_bytes,
    gguf_fields_of_pieces,
    sentencepiece_file,
)

TEXTS = ("The price of a lamp is 1234 euro.", "灯的价格是多少？ 😀", "def f(x):\n    return x\n\n", "  a  b \t")


def words(pre: str, text: str) -> list[str]:
    """How a text is split, read back as text."""
    tokenizer = from_fields(gguf_fields_of_bytes(pre))
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


def test_gpt2_is_what_it_was_trained_as() -> None:
    tokenizer = from_fields(gguf_fields_of_bytes("gpt-2"))
    for text in TEXTS:
        assert tokenizer.encode_text(text) == byte_level_backend().encode(text).ids


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", "  ", " now", "!!", "\n"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "  ", " now", "!!", "\n"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", "  ", " now", "!!\n"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "  ", " now", "!!\n"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "  ", " now", "!!\n"]),
    ],
)
def test_splits_are_the_families(pre: str, expected: list[str]) -> None:
    assert words(pre, "I'll pay 1234   now!!\n") == expected


def test_smollm_takes_digits_one_by_one_before_anything_else() -> None:
    reference = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    text = "a  1 ½ ３ x2y  \n9"
    assert words("smollm", text) == [text[s:e] for _, (s, e) in reference.pre_tokenize_str(text)]


def test_qwen_composes_characters() -> None:
    qwen, gpt2 = (from_fields(gguf_fields_of_bytes(pre)) for pre in ("qwen2", "gpt-2"))
    assert qwen.encode_text("e\u0301") == qwen.encode_text("é")
    assert gpt2.encode_text("e\u0301") != gpt2.encode_text("é")


def test_bos_follows_the_key_and_else_the_family() -> None:
    for pre, expected in (("smollm", False), ("llama-bpe", True)):
        assert from_fields(gguf_fields_of_bytes(pre)).add_bos is expected
    fields = gguf_fields_of_bytes("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    assert from_fields(fields).add_bos is False


def test_user_defined_tokens_are_whole_but_not_special() -> None:
    fields = gguf_fields_of_bytes()
    at = fields["tokenizer.ggml.tokens"].index("<|user|>")
    fields["tokenizer.ggml.token_type"][at] = 4
    tokenizer = from_fields(fields)
    assert tokenizer.encode_text("a<|user|>")[-1] == at and "<|user|>" not in tokenizer.special_tokens
    assert tokenizer.decode([at]) == "<|user|>"


def test_other_ends_are_stop_ids() -> None:
    fields = gguf_fields_of_bytes() | {"tokenizer.ggml.eot_token_id": 5}
    assert 5 in from_fields(fields).stop_ids


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_equal_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    path = sentencepiece_file(tmp_path, add_dummy_prefix=prefix)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = from_fields(gguf_fields_of_pieces(path) | {"tokenizer.ggml.add_space_prefix": prefix})
    assert tokenizer.add_bos is True and tokenizer.has_prefix_space is prefix
    for text in (*TEXTS, "</s><s><unk>", "<0x41>"):
        assert tokenizer.encode_text(text) == oracle.EncodeAsIds(text)
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, "'smolm' is not known.*nearest: smollm"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported"),
        ({"tokenizer.ggml.model": None}, "has no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "a token stands twice"),
        ({"tokenizer.ggml.token_type": [1]}, "1 values, expected 417"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id: 1000000 is not a token"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair"),
    ],
)
def test_broken_keys_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        from_fields(gguf_fields_of_bytes() | change)


def test_every_named_pre_tokenizer_can_be_built() -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer = from_fields(gguf_fields_of_bytes(pre))
        for text in TEXTS[:1]:
            assert tokenizer.decode(tokenizer.encode_text(text)) == text
