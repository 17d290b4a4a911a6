"""What a tokenizer is, before it is used: the parts that every file format has to give. Reads no file itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.models import BPE

from alpaca_lora.errors import ModelFileError


@dataclass(frozen=True)
class TokenizerDefinition:
    """``backend`` is the Rust tokenizer as it came; the names are token strings of its vocabulary.

    add_bos: the model wants a BOS in front of every text. stop_ids: ids the model's files name as ends, beside EOS.
    extra: the keys of tokenizer_config.json that we keep and do not read. source: for messages.
    """

    backend: Tokenizer
    source: str
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    add_bos: bool = False
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def token_id(self, role: str) -> int | None:
        """Id of the ``bos``, ``eos``, ``pad`` or ``unk`` token; ModelFileError when it is named but does not exist."""
        token = getattr(self, role)
        if token is None:
            return None
        index = self.backend.token_to_id(token)
        if index is None:
            raise ModelFileError(
                f"{token!r} is not in the vocabulary",
                file=self.source,
                field=f"{role}_token",
                expected="a token of the tokenizer",
                fix="take the tokenizer files of one and the same model",
            )
        return index


def special(token: str) -> AddedToken:
    """A special token, matched as it is spelled."""
    return AddedToken(token, normalized=False, special=True)


def bos_post_processor(backend: Tokenizer, bos: str) -> processors.PostProcessor:
    """Puts BOS in front of a text, for other programs that load what we save."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def without_prefix_space(backend: Tokenizer) -> Tokenizer:
    """A copy that never puts a space in front of a text (for texts that go on from another)."""
    return Tokenizer.from_str(json.dumps(_strip_prefix(json.loads(backend.to_str()))))


def prefix_only_at_start(backend: Tokenizer) -> bool:
    """True when the space is put in front of a whole text only, and not of each text between special tokens."""
    pre_tokenizer = json.loads(_shell(backend))["pre_tokenizer"]
    return any(part.get("prepend_scheme") == "first" for part in _parts(pre_tokenizer, "pretokenizers"))


def decoder_kind(backend: Tokenizer, source: str) -> str:
    """``bytes``: the byte alphabet of GPT-2; ``pieces``: SentencePiece's, with byte fallback. Else ModelFileError."""
    types = {part.get("type") for part in _parts(json.loads(_shell(backend))["decoder"], "decoders")}
    if "ByteLevel" in types:
        return "bytes"
    if types & {"Metaspace", "ByteFallback", "Replace"}:
        return "pieces"
    raise ModelFileError(
        f"decoder {sorted(map(str, types))} is not supported",
        file=source,
        field="decoder",
        expected="a byte-level or SentencePiece tokenizer",
    )


def splits_locally(backend: Tokenizer) -> bool:
    """True when a text may be cut at a word boundary without a change of tokens: byte-level, no prefix space."""
    shell = json.loads(_shell(backend))
    normalizers = {part.get("type") for part in _parts(shell["normalizer"], "normalizers")}
    parts = _parts(shell["pre_tokenizer"], "pretokenizers")
    local = {"ByteLevel", "Digits", "Split"}
    return (
        normalizers <= {"NFC"}
        and any(part.get("type") == "ByteLevel" for part in parts)
        and all(part.get("type") in local and not part.get("add_prefix_space") for part in parts)
    )


def _shell(backend: Tokenizer) -> str:
    """The tokenizer's JSON without its vocabulary: quick, whatever the vocabulary's size."""
    shell = Tokenizer(BPE())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        if part is not None:
            setattr(shell, name, part)
    return shell.to_str()


def _parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [leaf for part in node[key] for leaf in _parts(part, key)] if key in node else [node]


def _strip_prefix(node: Any) -> Any:
    """The tokenizer's JSON without whatever puts a space in front."""
    if isinstance(node, list):
        return [_strip_prefix(part) for part in node if not (isinstance(part, dict) and part.get("type") == "Prepend")]
    if not isinstance(node, dict):
        return node
    cleaned = {key: value if key in ("model", "added_tokens") else _strip_prefix(value) for key, value in node.items()}
    if isinstance(cleaned.get("normalizer"), dict) and cleaned["normalizer"].get("type") == "Prepend":
        cleaned["normalizer"] = None
    if "prepend_scheme" in cleaned:
        cleaned["prepend_scheme"] = "never"
    if "add_prefix_space" in cleaned:
        cleaned["add_prefix_space"] = False
    return cleaned
