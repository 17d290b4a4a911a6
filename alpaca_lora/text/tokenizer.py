"""Text to ids and back. Knows which tokens are special and where a template may use them; knows no model.

Special tokens are added by us and only by us: BOS and EOS by the one who builds the ids, a template's own tokens where
the template (and not the row) wrote them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.processors import PostProcessor

from alpaca_lora.text.encoded import Encoded, Segment
from alpaca_lora.text.gguf_tokenizer import definition_from_gguf
from alpaca_lora.text.huggingface_tokenizer import definition_from_folder, write_folder
from alpaca_lora.text.rendered import Rendered
from alpaca_lora.text.tokenizer_definition import (
    TokenizerDefinition,
    bos_post_processor,
    decoder_kind,
    prefix_only_at_start,
    splits_locally,
    without_prefix_space,
)

# tokens that end a turn or a text in the chat formats of the families we load
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
)
_CHUNK = 1024  # texts per call of the Rust library: enough for all cores, little memory
_MIN_SHARED_CHARS = 64


class _Piece(NamedTuple):
    """Characters ``start`` to ``end``; ``special``: the id they are; ``inner``: goes on without a space in front."""

    start: int
    end: int
    special: int | None = None
    inner: bool = False


class Tokenizer:
    """vocab_size: largest id + 1. add_bos: the model wants BOS first. stop_ids: EOS and other ids that end an answer.

    special_tokens: token -> id of those that a text of the user may never become. fingerprint: sha256 over vocabulary,
    splitting and policy: equal fingerprints give equal ids.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        self._definition = definition
        self._backend = definition.backend
        self._post_processor = self._backend.post_processor  # kept for `save`
        self._backend.no_padding()
        self._backend.no_truncation()
        self._kind = decoder_kind(self._backend, definition.source)
        self._added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in self._added.items() if token.special}
        self.bos_id, self.eos_id = definition.token_id("bos"), definition.token_id("eos")
        self.pad_id, self.add_bos = definition.token_id("pad"), definition.add_bos
        for role in ("bos", "eos", "pad", "unk"):  # named ones are special even where the file forgot to say so
            index = definition.token_id(role)
            if index is not None:
                self.special_tokens.setdefault(getattr(definition, role), index)
        self.chat_template = definition.chat_template
        ends = (self.special_tokens.get(token) for token in END_TOKENS)
        stops = (self.eos_id, *definition.stop_ids, *ends)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i is not None and i < self.vocab_size))
        self._special_ids = frozenset(self.special_tokens.values())
        self._special_pattern = _pattern(self.special_tokens, self._added)
        self._prefix_after_special = not prefix_only_at_start(self._backend)
        self._cuts_are_safe = self._kind == "bytes" and splits_locally(self._backend)
        # encode never adds tokens and never recognizes special ones; offsets stay those of the text
        self._backend.post_processor = None  # type: ignore[assignment]
        self._backend.encode_special_tokens = True

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, or SentencePiece's tokenizer.model."""
        return cls(definition_from_folder(Path(path)))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], source: str = "GGUF file") -> Tokenizer:
        """From the ``tokenizer.*`` keys of a GGUF file (key -> Python value)."""
        return cls(definition_from_gguf(fields, source))

    @property
    def source(self) -> str:
        """The file or folder it came from."""
        return self._definition.source

    def special_strings(self) -> dict[str, str]:
        """``bos_token``, ``eos_token``, ``pad_token``, ``unk_token`` -> token, where there is one."""
        named = ((role, getattr(self._definition, role)) for role in ("bos", "eos", "pad", "unk"))
        return {f"{role}_token": token for role, token in named if token is not None}

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        d = self._definition
        policy = (d.bos, d.eos, d.pad, d.add_bos)
        return hashlib.sha256(f"{policy!r}\n{self._backend.to_str()}".encode()).hexdigest()

    def encode(self, rendered: Rendered) -> Encoded:
        """Ids of one text; see `encode_many`."""
        return self.encode_many([rendered])[0]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, special-token strings in it included as plain text."""
        return self.encode(Rendered(text, (), (), special=False, needs_eos=False)).ids

    def encode_many(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize each text once, in batches.

        A BOS that the template itself wrote is left out of the ids where `add_bos` says that one will be put in front:
        exactly one results.
        """
        results: list[Encoded] = []
        for start in range(0, len(rendered), _CHUNK):
            results.extend(self._encode_chunk(rendered[start : start + _CHUNK]))
        return results

    def starts_with_bos(self, encoded: Encoded) -> bool:
        """The ids begin with a BOS already (only possible where `add_bos` is false and the template wrote it)."""
        return self.bos_id is not None and bool(encoded.ids) and encoded.ids[0] == self.bos_id

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, as transformers gives it; broken characters become U+FFFD. Streaming: `Detokenizer`."""
        hidden = self._special_ids if skip_special else frozenset()
        return self._backend.decode([int(i) for i in ids if i not in hidden], skip_special_tokens=skip_special)

    def token_bytes(self, index: int) -> bytes:
        """The bytes a token stands for; a special token is its own name, an id without a token is empty."""
        added = self._added.get(index)
        if added is not None:
            return added.content.encode()
        token = self._backend.id_to_token(index)
        if token is None:
            return b""
        if self._kind == "bytes":
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def has_prefix_space(self) -> bool:
        """A text's first token carries a space that is not in the text."""
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return bool(ids) and self.token_bytes(ids[0]).startswith(b" ")

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json, chat_template.jinja, with which transformers gives the same ids."""
        self._backend.post_processor = self._saved_post_processor()  # type: ignore[assignment]
        try:
            text = self._backend.to_str(pretty=False)
        finally:
            self._backend.post_processor = None  # type: ignore[assignment]
        write_folder(Path(folder), self._definition, text)

    def _saved_post_processor(self) -> PostProcessor | None:
        """The one that came with the file where it does what `add_bos` says, else one that does."""
        self._backend.post_processor = self._post_processor  # type: ignore[assignment]
        wanted = [self.bos_id] if self.add_bos else []
        if self._backend.encode("", add_special_tokens=True).ids == wanted:
            return self._post_processor
        bos = self._definition.bos
        return bos_post_processor(self._backend, bos) if self.add_bos and bos is not None else None

    # --- how a text is cut before the Rust library sees it -------------------------------------------------------

    def _encode_chunk(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Cut each text into pieces, tokenize the different pieces together, join the ids."""
        pieces = [self._pieces(r) for r in rendered]
        outer: dict[str, Encoding] = {}
        inner: dict[str, Encoding] = {}
        for r, parts in zip(rendered, pieces, strict=True):
            for part in parts:
                if part.special is None:
                    (inner if part.inner else outer)[r.text[part.start : part.end]] = None  # type: ignore[assignment]
        for table, backend in ((outer, self._backend), (inner, self._inner_backend if inner else None)):
            if table and backend is not None:
                texts = list(table)
                table.update(zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True))
        return [self._join(r, parts, outer, inner) for r, parts in zip(rendered, pieces, strict=True)]

    def _join(
        self, rendered: Rendered, pieces: Sequence[_Piece], outer: Mapping[str, Encoding], inner: Mapping[str, Encoding]
    ) -> Encoded:
        ids: list[int] = []
        segments: list[Segment] = []
        for piece in pieces:
            if piece.special is not None:
                if piece.start == 0 and self.add_bos and piece.special == self.bos_id:
                    continue
                segments.append(Segment(piece.start, piece.end, len(ids), None))
                ids.append(piece.special)
                continue
            encoding = (inner if piece.inner else outer)[rendered.text[piece.start : piece.end]]
            segments.append(Segment(piece.start, piece.end, len(ids), encoding))
            ids.extend(encoding.ids)
        return Encoded(ids, segments, len(rendered.text))

    def _pieces(self, rendered: Rendered) -> list[_Piece]:
        """Template text is cut at its special tokens, and nowhere else unless the cut provably changes nothing."""
        text = rendered.text
        if not rendered.special or self._special_pattern is None:
            head = self._shared_head(text[: rendered.user_spans[0].start] if rendered.user_spans else "")
            plain = [_Piece(0, head), _Piece(head, len(text))] if head else [_Piece(0, len(text))]
            return [part for piece in plain for part in self._without_leaks(text, piece)]
        pieces: list[_Piece] = []
        at = 0
        for start, end, index in self._template_specials(rendered):
            if start > at:
                pieces.extend(
                    self._without_leaks(text, _Piece(at, start, inner=at > 0 and not self._prefix_after_special))
                )
            pieces.append(_Piece(start, end, special=index))
            at = end
        if at < len(text):
            pieces.extend(
                self._without_leaks(text, _Piece(at, len(text), inner=at > 0 and not self._prefix_after_special))
            )
        return pieces

    def _template_specials(self, rendered: Rendered) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each special token whose characters the template wrote; whitespace that the token eats
        (``lstrip``, ``rstrip``) is in its span."""
        assert self._special_pattern is not None
        at = 0
        for span in (*rendered.user_spans, None):
            stop = len(rendered.text) if span is None else span.start
            for match in self._special_pattern.finditer(rendered.text, at, stop):
                token = match.group()
                index = self.special_tokens.get(token)
                yield *match.span(), self.special_tokens[token.strip()] if index is None else index
            if span is not None:
                at = max(at, span.end)

    def _without_leaks(self, text: str, piece: _Piece) -> list[_Piece]:
        """Some vocabularies can merge plain text into a special token: cut inside of such a string."""
        if self._leak_pattern is None:
            return [piece]
        cuts = [match.start() + 1 for match in self._leak_pattern.finditer(text, piece.start, piece.end)]
        starts = [piece.start, *cuts]
        ends = [*cuts, piece.end]
        return [
            _Piece(start, end, inner=piece.inner or number > 0)
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    @cached_property
    def _leak_pattern(self) -> re.Pattern[str] | None:
        leaking = [
            token
            for token, index in self.special_tokens.items()
            if len(token) > 1 and index in self._backend.encode(f"a{token}b", add_special_tokens=False).ids
        ]
        return re.compile("|".join(re.escape(token) for token in leaking)) if leaking else None

    @cached_property
    def _inner_backend(self) -> Backend:
        backend = without_prefix_space(self._backend)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _heads(self) -> dict[str, int]:
        return {}

    def _shared_head(self, preamble: str) -> int:
        """Where the text before the row's own words may be cut so that its first part is tokenized once for all rows.

        The cut stands before the last words of the preamble: a word's end depends on nothing but the word and the next
        character (the patterns look one character ahead), so the rows' words cannot move it.
        """
        if len(preamble) < _MIN_SHARED_CHARS or not self._cuts_are_safe or self._backend.pre_tokenizer is None:
            return 0
        if preamble not in self._heads:
            words = self._backend.pre_tokenizer.pre_tokenize_str(preamble)
            cut = words[-5][1][0] if len(words) > 8 else 0
            whole, head, tail = (self._backend.encode(t).ids for t in (preamble, preamble[:cut], preamble[cut:]))
            self._heads[preamble] = cut if whole == head + tail else 0
        return self._heads[preamble]


def _pattern(special_tokens: Mapping[str, int], added: Mapping[int, AddedToken]) -> re.Pattern[str] | None:
    """Matches any special token, longest first, with the whitespace it eats."""
    alternatives = []
    for token in sorted(special_tokens, key=len, reverse=True):
        flags = added.get(special_tokens[token])
        left = r"\s*" if flags is not None and flags.lstrip else ""
        right = r"\s*" if flags is not None and flags.rstrip else ""
        alternatives.append(left + re.escape(token) + right)
    return re.compile("|".join(alternatives)) if alternatives else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones are themselves, the others are U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF: Mapping[str, int] = _byte_alphabet()
