"""Looks into base64: pieces of a text that decode to words are searched like the text itself, one level deep.

A piece is a run of the alphabet (both of RFC 4648) without white space in it. Every way to group its letters by four is
tried, since a piece may begin in the middle of a run.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from alpaca_lora.safety.fold import PLAIN, Fold
from alpaca_lora.safety.matcher import Matcher, finds
from alpaca_lora.safety.view import Place, Scan, Span, View

SHORTEST = 16  # letters; twelve characters of text
LONGEST = 4096  # letters looked at together; a longer run is looked at in overlapping parts
_OVERLAP = 1024

# a longer run need not be read to its end for each of its parts
_RUN = re.compile(rf"[A-Za-z0-9+/_-]{{{SHORTEST},{LONGEST + 1}}}={{0,2}}")
_OPEN_RUN = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]+={0,2}\Z")
_TO_STANDARD = str.maketrans("-_", "+/")
_WORDS = re.compile("[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]{8,}")


class Base64Matcher:
    """Runs of base64 in which one of the given matchers finds something."""

    fold: Fold = PLAIN
    most_held = LONGEST

    def __init__(self, inner: Sequence[Matcher]) -> None:
        self._inner = inner

    def scan(self, view: View, scan: Scan) -> list[Span]:
        text, first = view.text, view.first.char
        at, spans = scan.at.char - first, []
        while (run := _RUN.search(text, at)) is not None:
            start, end = run.span()
            if end - start > LONGEST:
                end, following = start + LONGEST, start + LONGEST - _OVERLAP
            elif end == len(text) and not view.final:
                break
            else:
                following = end
            if self._finds(text[start:end]):
                spans.append(view.span(first + start, first + end))
            at = following
        if not view.final:
            open_run = _OPEN_RUN.search(text, max(at, len(text) - SHORTEST - 2)) if run is None else run
            at = len(text) if open_run is None else open_run.start()
        else:
            at = len(text)
        scan.at = Place(first + at, -1)
        return spans

    def _finds(self, run: str) -> bool:
        return any(finds(matcher, text) for text in decoded(run) for matcher in self._inner)


def decoded(run: str) -> list[str]:
    """The words in a run of base64, for each of the four ways to group it that gives any; lines between them."""
    letters = run.rstrip("=").translate(_TO_STANDARD)
    texts = []
    for skipped in range(4):
        piece = letters[skipped:]
        piece = piece[:-1] if len(piece) % 4 == 1 else piece
        content = base64.b64decode(piece + "=" * (-len(piece) % 4)).decode("utf-8", errors="replace")
        if words := _WORDS.findall(content):
            texts.append("\n".join(words))
    return texts
