"""Hugging Face folders: which files are read, which policy they mean, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import normalizers, processors

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.huggingface_tokenizer import definition_from_folder
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.rendered import Rendered, Span
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.templates import load_template
from alpaca_lora.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import CHATML, LLAMA2, byte_level, byte_level_backend, sentencepiece_file


def folder_with(folder: Path, config: dict[str, Any] | None = None, backend: Any = None, **files: Any) -> Path:
    backend = backend or byte_level_backend()
    backend.save(str(folder / "tokenizer.json"))
    base = {"eos_token": "</s>", "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | (config or {})), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def with_bos_processor() -> Any:
    backend = byte_level_backend()
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos)])]
    )
    return backend


def test_bos_policy(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(folder_with(tmp_path)).add_bos is False
    assert Tokenizer.from_folder(folder_with(tmp_path, backend=with_bos_processor())).add_bos is True
    config = {"add_bos_token": False}
    assert Tokenizer.from_folder(folder_with(tmp_path, config, with_bos_processor())).add_bos is False
    assert Tokenizer.from_folder(folder_with(tmp_path, {"add_bos_token": True})).add_bos is True


def test_bos_is_never_in_the_ids_and_offsets_are_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, backend=with_bos_processor()))
    encoded = tokenizer.encode(Rendered("a the b", (Span(0, 7),), (), special=False, needs_eos=True))
    assert encoded.ids == byte_level().encode_text("a the b")
    assert encoded.token_at(1) == (1, False)  # the space belongs to its token, though the file asks to trim it
    tokenizer.save(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a the b")["input_ids"]
    assert ids == [tokenizer.bos_id, *encoded.ids]


def test_names_may_stand_in_the_special_tokens_map(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, special_tokens_map={"pad_token": "<|endoftext|>"})
    assert Tokenizer.from_folder(folder).pad_id == byte_level().special_tokens["<|endoftext|>"]


def test_ends_of_the_generation_config_are_stop_ids(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, generation_config={"eos_token_id": [3, 4]})
    assert set(Tokenizer.from_folder(folder).stop_ids) >= {3, 4}


@pytest.mark.parametrize("where", ["config", "named", "jinja", "json"])
def test_where_chat_templates_are_found(tmp_path: Path, where: str) -> None:
    config: dict[str, Any] = {"config": {"chat_template": CHATML}}.get(where, {})
    if where == "named":
        entries = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        config = {"chat_template": entries}
    folder = folder_with(tmp_path, config)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8", newline="")
    if where == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}), encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == CHATML


def test_tokens_declared_beside_the_file(tmp_path: Path) -> None:
    size = byte_level().vocab_size
    declared = {str(size): {"content": "<|new|>", "special": True}}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"added_tokens_decoder": declared}))
    assert tokenizer.special_tokens["<|new|>"] == size
    with pytest.raises(ModelFileError, match=rf"'<\|new\|>' is token {size}.*expected id 9999"):
        Tokenizer.from_folder(folder_with(tmp_path, {"added_tokens_decoder": {"9999": {"content": "<|new|>"}}}))


def test_flags_of_declared_tokens_are_kept(tmp_path: Path) -> None:
    size = byte_level().vocab_size
    flags = {"special": False, "normalized": True, "lstrip": True, "rstrip": False}
    declared = {
        str(size): {"content": "plain", **flags},
        str(size + 1): {"content": "<pad>", **flags, "lstrip": False, "rstrip": True},
    }
    config = {"added_tokens_decoder": declared, "pad_token": "<pad>"}
    backend = definition_from_folder(folder_with(tmp_path, config)).backend
    added = backend.get_added_tokens_decoder()
    plain, pad = added[size], added[size + 1]
    assert (plain.special, plain.normalized, plain.lstrip, plain.rstrip) == (False, True, True, False)
    assert (pad.special, pad.normalized, pad.lstrip, pad.rstrip) == (True, True, False, True)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert "plain" not in tokenizer.special_tokens and size in tokenizer.encode_text("a plain")


def test_added_tokens_of_older_folders(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path)
    size = Tokenizer.from_folder(tmp_path).vocab_size
    tokens = ("[PAD]", "<|turn|>", "lamp_12", "<extra>")
    added = {token: size + number for number, token in enumerate(tokens)}
    special_map = {"pad_token": {"content": "[PAD]"}, "additional_special_tokens": ["<extra>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict(reversed(added.items()))), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pad_id == size and tokenizer.vocab_size == size + 4
    assert set(added) & tokenizer.special_tokens.keys() == {"[PAD]", "<|turn|>", "<extra>"}
    ids = tokenizer.encode_text("a lamp_12 <|turn|>")
    assert size + 2 in ids and size + 1 not in ids  # the special one stays plain characters in a text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"[PAD]": 9999}, r"added_tokens\.json: \[PAD\]: .*is token 420 in the tokenizer, expected id 9999"),
        ({"[PAD]": "420"}, r"added_tokens\.json: \[PAD\]: '420' is not an id"),
    ],
)
def test_added_tokens_with_other_ids_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    sentencepiece_file(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_legacy_llama_folders_equal_the_file_itself(tmp_path: Path) -> None:
    """The space in front of each text between special tokens, as the published Llama 2 tokenizer.json writes it."""
    pieces = Tokenizer(definition_from_model(sentencepiece_file(tmp_path)))
    pieces.save(tmp_path)
    check_chat_ids(tmp_path)


def test_newer_llama_folders_have_the_space_at_the_start_only(tmp_path: Path) -> None:
    pieces = Tokenizer(definition_from_model(sentencepiece_file(tmp_path)))
    pieces.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    check_chat_ids(tmp_path)


def check_chat_ids(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": LLAMA2}), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    turns = (("user", "price?"), ("assistant", "12 euro"), ("user", "灯"), ("assistant", "ok"))
    row = Conversation(tuple(Message(role, content) for role, content in turns), "chat", "", 0)  # type: ignore[arg-type]
    rendered = load_template("chat", tokenizer).render(row)
    ids = [tokenizer.bos_id, *tokenizer.encode(rendered).ids]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert ids == oracle.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_normalizers_move_offsets_not_boundaries(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, backend=backend))
    text = "e\u0301e\u0301 the"
    encoded = tokenizer.encode(Rendered(text, (Span(0, len(text)),), (), special=False, needs_eos=True))
    start, end, straddling = encoded.span_tokens(Span(4, len(text)))
    assert tokenizer.decode(encoded.ids[start:end]) == " the" and straddling == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json:1: .*expected JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "is not a tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 0}}}', "two tokens have the same id"),
        ("tokenizer.json", '{"model": []}', "is not a tokenizer"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON: maximum recursion depth"),
        ("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token: 7 is not a token"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "'<none>' is not in the vocabulary"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder_with(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_chat_template_in_another_encoding_is_named(tmp_path: Path) -> None:
    folder_with(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: byte 3 is not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_cannot_be_read_back_as_bytes_is_refused(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.decoder = None
    with pytest.raises(ModelFileError, match="decoder"):
        Tokenizer.from_folder(folder_with(tmp_path, backend=backend))
