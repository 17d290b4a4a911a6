"""Tokenizers: what is special and what is not, speed without a change of ids, and saving for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.messages import instruction
from alpaca_lora.text.rendered import Rendered, Span
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.templates import INSTRUCTION_TEMPLATES
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition
from tests.text.tiny_tokenizers import SPECIALS, byte_level, byte_level_backend, of_family, sentencepiece_file

SAMPLES = (
    "Below is an instruction that describes a task.", "灯的价格是多少？", "😀👍🏽 e\u0301 é",
    "def f(x):\n    return x ** 22\n\n\n",
    "  two  spaces\tand\r\nlines ", "1234567890", "Grüße aus Übersee", " ".join(SPECIALS), "",
)  # fmt: skip


def plain(text: str) -> Rendered:
    return Rendered(text, (Span(0, len(text)),), (), special=False, needs_eos=True)


def test_ids_of_plain_text_hold_no_special_token() -> None:
    tokenizer = byte_level()
    for token in SPECIALS:
        ids = tokenizer.encode_text(f"a {token}{token} b")
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == f"a {token}{token} b"


def test_template_text_becomes_special_only_outside_of_users_text() -> None:
    tokenizer = byte_level()
    end = tokenizer.special_tokens["<|im_end|>"]
    text = "<|im_end|>ab<|im_end|>cd<|im_end|>"
    encode = lambda *spans: tokenizer.encode(Rendered(text, spans, (), special=True, needs_eos=False)).ids  # noqa: E731
    assert encode().count(end) == 3
    assert encode(Span(10, 22)).count(end) == 2
    assert encode(Span(10, 12), Span(22, 24)).count(end) == 3  # the middle one lies between two users' texts
    assert encode(Span(21, 23)).count(end) == 2  # half of it is the user's
    assert encode(Span(0, len(text))).count(end) == 0


def test_a_name_joined_from_two_sides_is_not_a_token() -> None:
    tokenizer = byte_level()
    rendered = Rendered("<|im_end|>", (Span(5, 10),), (), special=True, needs_eos=False)
    assert tokenizer.special_tokens["<|im_end|>"] not in tokenizer.encode(rendered).ids


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=30), st.text(max_size=20), st.text()), max_size=4))
def test_the_shared_preamble_never_changes_an_id(rows: list[tuple[str, str, str]]) -> None:
    tokenizer = _SHARED
    rendered = [INSTRUCTION_TEMPLATES["alpaca"].render(instruction(*row)) for row in rows if _encodable(row)]
    for one, encoded in zip(rendered, tokenizer.encode_many(rendered), strict=True):
        assert len(encoded._segments) == 2  # it was cut, or this test shows nothing
        assert encoded.ids == tokenizer._backend.encode(one.text).ids


def _encodable(row: tuple[str, str, str]) -> bool:
    return not any("\ud800" <= char <= "\udfff" for text in row for char in text)


_SHARED = byte_level()


def test_many_are_the_same_as_one_by_one() -> None:
    tokenizer = of_family("chatml")
    rendered = [plain(text) for text in SAMPLES] * 200
    rendered += [Rendered(f"<|im_start|>{t}<|im_end|>", (Span(12, 12 + len(t)),), (), True, False) for t in SAMPLES]
    assert [e.ids for e in tokenizer.encode_many(rendered)] == [tokenizer.encode(r).ids for r in rendered]


def test_a_vocabulary_that_spells_its_special_tokens_cannot_leak_them(tmp_path: Path) -> None:
    """A merge list that leads to ``<s>``: plain text would become the token itself."""
    content = json.loads(definition_from_model(sentencepiece_file(tmp_path)).backend.to_str())
    vocab = content["model"]["vocab"]
    for token in ("<", "s", ">", "<s"):
        vocab.setdefault(token, len(vocab))
    content["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    backend = Backend.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    assert vocab["<s>"] in backend.encode("a<s>b", add_special_tokens=False).ids  # the danger is real
    tokenizer = Tokenizer(TokenizerDefinition(backend, "leaky", bos="<s>", eos="</s>"))
    ids = tokenizer.encode_text("a<s>b<s>")
    assert tokenizer.bos_id not in ids and tokenizer.decode(ids) == "a<s>b<s>"


def test_whitespace_eaten_by_a_token_of_the_template() -> None:
    """``rstrip`` tokens (Phi-3) take the white space after them, as transformers does."""
    content = json.loads(byte_level_backend().to_str())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] == "<|user|>"
    tokenizer = Tokenizer(TokenizerDefinition(type(byte_level_backend()).from_str(json.dumps(content)), "phi"))
    rendered = Rendered("<|user|>\nab", (Span(9, 11),), (), special=True, needs_eos=False)
    assert tokenizer.encode(rendered).ids == [tokenizer.special_tokens["<|user|>"], *tokenizer.encode_text("ab")]


def test_stop_ids_are_eos_and_the_ends_of_turns() -> None:
    tokenizer = byte_level(eos="</s>")
    names = {"</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"}
    assert set(tokenizer.stop_ids) == {tokenizer.special_tokens[name] for name in names}
    assert tokenizer.stop_ids[0] == tokenizer.eos_id
    assert byte_level(stop_ids=(7,)).stop_ids[1] == 7


def test_pad_may_be_eos_and_nothing_may_be_there() -> None:
    tokenizer = byte_level(pad="<|endoftext|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    bare = byte_level(eos=None)
    assert (bare.eos_id, bare.pad_id, bare.bos_id) == (None, None, None)


def test_a_named_token_must_exist() -> None:
    with pytest.raises(ModelFileError, match=r"tiny: eos_token: '<nowhere>' is not in the vocabulary"):
        byte_level(eos="<nowhere>")


def test_token_bytes_of_every_token_are_its_text() -> None:
    tokenizer = byte_level()
    assert tokenizer.vocab_size == 400 + len(SPECIALS)
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.token_bytes(tokenizer.special_tokens["<s>"]) == b"<s>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_fingerprints_tell_policies_apart() -> None:
    assert byte_level().fingerprint == byte_level().fingerprint
    others = {byte_level(eos="</s>").fingerprint, byte_level(bos="<s>", add_bos=True).fingerprint}
    assert byte_level().fingerprint not in others and len(others) == 2


@pytest.mark.parametrize("add_bos", [False, True])
def test_transformers_gives_the_same_ids_from_what_we_save(tmp_path: Path, add_bos: bool) -> None:
    tokenizer = byte_level(bos="<s>", add_bos=add_bos, pad="</s>", chat_template="{{ messages }}\n")
    tokenizer.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        if text != " ".join(SPECIALS):  # transformers reads them as tokens out of any text
            ids = [*([tokenizer.special_tokens["<s>"]] if add_bos else []), *tokenizer.encode_text(text)]
            assert oracle(text)["input_ids"] == ids
            assert oracle.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text
    assert (oracle.bos_token, oracle.pad_token, oracle.chat_template) == ("<s>", "</s>", tokenizer.chat_template)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.fingerprint, again.add_bos, again.chat_template) == (
        tokenizer.fingerprint, add_bos, tokenizer.chat_template,
    )  # fmt: skip


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    of_family("llama3").save(first)
    Tokenizer.from_folder(first).save(second)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    from alpaca_lora.weights.gguf import open_gguf

    file = open_gguf(smollm2)
    try:
        return Tokenizer.from_gguf(file.tokenizer_fields, str(smollm2))
    finally:
        file.close()


def test_the_real_model(smollm2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49152, 1, 2, 2)
    assert tokenizer.add_bos is False and tokenizer.stop_ids == (2, 0)
    # ids that the published tokenizer gives
    assert tokenizer.encode_text("Hello world 12") == [19556, 905, 216, 33, 34]
    tokenizer.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES[:-2]:
        assert oracle(text)["input_ids"] == tokenizer.encode_text(text)
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.slow
def test_transformers_reads_the_same_from_the_gguf(smollm2: Path, smollm2_tokenizer: Tokenizer) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    for text in SAMPLES[:-2]:
        if not any(char.isdigit() for char in text):  # it does not know that smollm takes digits one by one
            assert oracle(text)["input_ids"] == smollm2_tokenizer.encode_text(text)
    chat = [{"role": "user", "content": "灯?"}, {"role": "assistant", "content": "一"}]
    from alpaca_lora.text.chat_template import ChatTemplate

    assert smollm2_tokenizer.chat_template is not None
    template = ChatTemplate(smollm2_tokenizer.chat_template, smollm2_tokenizer, source="gguf")
    for generate in (False, True):
        expected = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        assert template.render_text(chat, generate=generate) == expected
