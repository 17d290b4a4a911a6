"""Token ids of one text, and which token stands at which character. Character offsets are those of `Rendered.text`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding

from alpaca_lora.text.rendered import Span


class Boundary(NamedTuple):
    """``token``: index of the first token that begins at or after the character; ``straddles``: the token before it
    begins before the character and ends after it."""

    token: int
    straddles: bool


class TokenSpan(NamedTuple):
    """Tokens ``start`` to ``end`` lie wholly inside a span of characters; ``num_straddling`` more lie partly inside."""

    start: int
    end: int
    num_straddling: int


class Segment(NamedTuple):
    """Characters ``start`` to ``end`` became the tokens from ``token`` on; no encoding: they are one special token."""

    start: int
    end: int
    token: int
    encoding: Encoding | None


class Encoded:
    """Ids of one text, with neither the BOS nor the EOS that we add.

    It holds the tokenizer's own record of offsets (some hundred bytes per token): encode in chunks of about a
    thousand rows and let go of them.
    """

    __slots__ = ("_segments", "_starts", "ids", "num_chars")

    def __init__(self, ids: list[int], segments: Sequence[Segment], num_chars: int) -> None:
        self.ids = ids
        self.num_chars = num_chars
        self._segments = segments
        self._starts = [segment.start for segment in segments]

    def __len__(self) -> int:
        return len(self.ids)

    def token_at(self, char: int) -> Boundary:
        """The token boundary at character ``char`` (0 to `num_chars`)."""
        at = bisect_right(self._starts, char) - 1
        if char >= self.num_chars:
            return Boundary(len(self.ids), False)
        if at < 0:
            return Boundary(0, False)
        segment = self._segments[at]
        following = self._segments[at + 1].token if at + 1 < len(self._segments) else len(self.ids)
        if char >= segment.end:
            return Boundary(following, False)
        if char == segment.start:
            return Boundary(segment.token, False)
        if segment.encoding is None:
            return Boundary(following, True)
        index, straddles = _boundary_within(segment.encoding, char - segment.start, segment.end - segment.start)
        return Boundary(segment.token + index, straddles)

    def span_tokens(self, span: Span) -> TokenSpan:
        """The tokens wholly inside ``span``."""
        first, last = self.token_at(span.start), self.token_at(span.end)
        end = last.token - 1 if last.straddles else last.token
        if end < first.token:  # one token covers the whole span and more
            return TokenSpan(first.token, first.token, 1)
        return TokenSpan(first.token, end, int(first.straddles) + int(last.straddles))


def _boundary_within(encoding: Encoding, char: int, num_chars: int) -> tuple[int, bool]:
    """`Encoded.token_at` inside of one encoding; a character that no token covers belongs to the token after it."""
    token = encoding.char_to_token(char)
    ahead = char
    while token is None and (ahead := ahead + 1) < num_chars:
        token = encoding.char_to_token(ahead)
    num_tokens = len(encoding)
    if token is None:
        return num_tokens, False
    if _start(encoding, token) >= char:
        return token, False
    # the bytes of one character may be several tokens with the same offsets
    while token < num_tokens and _start(encoding, token) < char:
        token += 1
    return token, True


def _start(encoding: Encoding, token: int) -> int:
    offsets = encoding.token_to_chars(token)
    return 0 if offsets is None else offsets[0]
