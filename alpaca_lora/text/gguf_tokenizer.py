"""Builds a tokenizer from the ``tokenizer.*`` keys of a GGUF file.

Knows the keys, not the file: `weights/gguf.py` reads that.

Source: the GGUF specification (tokenizer keys) and the pre-tokenizer names that its converters write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from alpaca_lora.errors import ModelFileError, nearest
from alpaca_lora.text.sentencepiece_tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Pieces, build_bpe, build_unigram
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition, bos_post_processor, special

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> (digits one by one first, split)
PRE_TOKENIZERS: Mapping[str, tuple[bool, str]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jais"), (False, _GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (True, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), (False, _LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (False, _QWEN2)),
    "tekken": (False, _TEKKEN),
}
# whole words of the vocabulary are taken before any merge
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def definition_from_gguf(fields: Mapping[str, Any], source: str = "GGUF file") -> TokenizerDefinition:
    """``fields``: GGUF key -> Python value. Raises ModelFileError for a kind of tokenizer that we cannot rebuild."""
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise ModelFileError("has no tokenizer", file=source, field="tokenizer.ggml.model", expected="a tokenizer")
    if len(set(tokens)) != len(tokens):
        raise ModelFileError(
            "a token stands twice", file=source, field="tokenizer.ggml.tokens", expected="unique tokens"
        )
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelFileError(
            f"{len(types)} values",
            file=source,
            field="tokenizer.ggml.token_type",
            expected=f"{len(tokens)}, one per token",
        )
    pre = str(fields.get("tokenizer.ggml.pre") or "")
    if kind == "gpt2":
        backend = _byte_level(fields, tokens, types, pre, source)
        bos_default = pre in _BOS_BY_DEFAULT
    elif kind in ("llama", "t5"):
        backend = _pieces(fields, tokens, types, kind)
        bos_default = kind == "llama"
    else:
        raise ModelFileError(
            f"{kind!r} is not supported",
            file=source,
            field="tokenizer.ggml.model",
            expected="gpt2, llama or t5",
            fix="use the model's Hugging Face folder",
        )
    named = {role: _named(fields, role, tokens, source) for role in ("bos", "eos", "padding", "unknown")}
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", bos_default)) and named["bos"] is not None
    if add_bos and named["bos"] is not None:
        backend.post_processor = bos_post_processor(backend, named["bos"])
    ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    return TokenizerDefinition(
        backend,
        source,
        bos=named["bos"],
        eos=named["eos"],
        pad=named["padding"],
        unk=named["unknown"],
        add_bos=add_bos,
        chat_template=fields.get("tokenizer.chat_template"),
        stop_ids=tuple(i for i in ends if i is not None),
    )


def _named(fields: Mapping[str, Any], role: str, tokens: list[str], source: str) -> str | None:
    key = f"tokenizer.ggml.{role}_token_id"
    index = fields.get(key)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ModelFileError(f"{index} is not a token", file=source, field=key, expected=f"0 to {len(tokens) - 1}")
    return tokens[index]


def _byte_level(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], pre: str, source: str
) -> Tokenizer:
    if pre not in PRE_TOKENIZERS:
        hint = nearest(pre, PRE_TOKENIZERS)
        raise ModelFileError(
            f"{pre!r} is not known, so texts would be split wrongly",
            file=source,
            field="tokenizer.ggml.pre",
            expected=f"one of {', '.join(PRE_TOKENIZERS)}" + (f" (nearest: {hint[0]})" if hint else ""),
            fix="use the model's Hugging Face folder",
        )
    merges = [_pair(merge, source) for merge in fields.get("tokenizer.ggml.merges") or ()]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    digits_first, split = PRE_TOKENIZERS[pre]
    if pre.startswith(("qwen2", "deepseek-r1-qwen")):
        backend.normalizer = normalizers.NFC()
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", False))
    parts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if digits_first else []
    if split == _GPT2:
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True))
    else:
        parts.append(pre_tokenizers.Split(Regex(split), "isolated"))
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    _add_marked(backend, tokens, types)
    return backend


def _pieces(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], kind: str) -> Tokenizer:
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if str(fields.get("general.architecture", "")).startswith("gemma"):
        # runs of spaces are spelled with spaces, and the order of the file, not the score, is the order of the merges
        tokens = ["\u2581" * len(t) if t.isspace() and set(t) == {" "} else t for t in tokens]
        scores = [-float(i) for i in range(len(tokens))]
    pieces = Pieces(tuple(tokens), tuple(scores), tuple(types), prefix)
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or ()]
    backend = build_unigram(pieces) if kind == "t5" else build_bpe(pieces, merges=merges or None)
    _add_marked(backend, tokens, types)
    return backend


def _pair(merge: str, source: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelFileError(
            f"{merge!r} is not a pair", file=source, field="tokenizer.ggml.merges", expected="'left right'"
        )
    return left, right


def _add_marked(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are special; user-defined ones are always matched whole but are plain text otherwise."""
    pairs = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([special(token) for token, kind in pairs if kind in (CONTROL, UNKNOWN)])
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in pairs if kind == USER_DEFINED]
    )
