"""Builds a tokenizer from SentencePiece's pieces, and reads them out of a ``tokenizer.model`` file.

The Rust tokenizer gives offsets and batches, which SentencePiece's own does not; what we build is compared with
SentencePiece on probe texts when a file is read, so that a normalization we do not rebuild is an error and not a drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition, bos_post_processor, special

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
_SPACE = "\u2581"
_PROBES = (
    "Below is an instruction that describes a task.",
    "a  b\n\n\tc",
    " leading",
    "价格是多少？",
    "Écrivez ½ of it",
    "def f(x):\n    return x ** 2",
    "😀👍🏽",
)


class Pieces(NamedTuple):
    """One entry per id. ``prefix``: a space stands in front of a text (SentencePiece's dummy prefix)."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    prefix: bool


def build_bpe(pieces: Pieces, *, merges: Sequence[tuple[str, ...]] | None = None) -> Tokenizer:
    """BPE over pieces with byte fallback; ``merges`` are rebuilt from the scores when the file has none."""
    vocab = {token: index for index, token in enumerate(pieces.tokens)}
    unknown = next((t for t, kind in zip(pieces.tokens, pieces.types, strict=True) if kind == UNKNOWN), None)
    pairs = [(left, right) for left, right in merges] if merges is not None else merges_from_scores(pieces)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in pieces.types)
    )
    backend.normalizer = _normalizer(pieces.prefix)
    backend.decoder = _decoder(pieces.prefix)
    return backend


def build_unigram(pieces: Pieces) -> Tokenizer:
    """The unigram language model over pieces."""
    unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else None
    vocab = list(zip(pieces.tokens, pieces.scores, strict=True))
    backend = Tokenizer(models.Unigram(vocab, unknown, BYTE in pieces.types))
    backend.normalizer = _normalizer(pieces.prefix)
    backend.decoder = _decoder(pieces.prefix)
    return backend


def merges_from_scores(pieces: Pieces) -> list[tuple[str, str]]:
    """SentencePiece's BPE joins the neighbours whose joint piece has the highest score: merges in that order.

    Only normal pieces take part, so that no text can be joined into a control token.
    """
    normal = {
        token: index
        for index, (token, kind) in enumerate(zip(pieces.tokens, pieces.types, strict=True))
        if kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, index in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-pieces.scores[index], normal[left], normal[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3] for merge in merges]


def definition_from_model(path: Path) -> TokenizerDefinition:
    """Reads ``tokenizer.model``. Raises ModelFileError when it is not one or our rebuild differs from SentencePiece."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ModelFileError("is not a SentencePiece model", file=path, fix="fetch the file again") from error
    pieces = _read(processor)
    # BPE scores are minus the order of the merges, unigram scores are logarithms of probabilities
    normal = [s for s, kind in zip(pieces.scores, pieces.types, strict=True) if kind == NORMAL]
    backend = build_bpe(pieces) if all(s == int(s) for s in normal) else build_unigram(pieces)
    marked = zip(pieces.tokens, pieces.types, strict=True)
    for token, kind in marked:
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([special(token)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != processor.EncodeAsIds(probe):
            raise ModelFileError(
                f"its normalization is not supported: {probe!r} gives other tokens",
                file=path,
                fix="put the model's tokenizer.json beside it",
            )
    bos, eos, pad, unk = (
        processor.IdToPiece(i) if i >= 0 else None
        for i in (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id())
    )
    if bos is not None:
        backend.post_processor = bos_post_processor(backend, bos)
    return TokenizerDefinition(backend, str(path), bos=bos, eos=eos, pad=pad, unk=unk, add_bos=bos is not None)


def _read(processor: sentencepiece.SentencePieceProcessor) -> Pieces:
    size = processor.GetPieceSize()
    tokens = tuple(processor.IdToPiece(i) for i in range(size))
    scores = tuple(processor.GetScore(i) for i in range(size))
    types = tuple(_kind(processor, i) for i in range(size))
    normal = next((t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL and t.strip(_SPACE)), "a")
    prefix = processor.EncodeAsPieces(normal.strip(_SPACE))[0].startswith(_SPACE)
    return Pieces(tokens, scores, types, prefix)


def _kind(processor: sentencepiece.SentencePieceProcessor, index: int) -> int:
    if processor.IsUnknown(index):
        return UNKNOWN
    if processor.IsControl(index):
        return CONTROL
    if processor.IsByte(index):
        return BYTE
    if processor.IsUnused(index):
        return UNUSED
    # the library does not tell user-defined pieces apart; where that matters the probes differ
    return NORMAL


def _normalizer(prefix: bool) -> normalizers.Normalizer:
    """Spaces are spelled; the one in front comes before each text between special tokens too, as in the tokenizer.json
    files that these models were published with."""
    replace = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace


def _decoder(prefix: bool) -> decoders.Decoder:
    parts: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(parts)
