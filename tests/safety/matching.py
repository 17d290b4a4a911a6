"""What a matcher finds in a text, whole and in pieces."""

from __future__ import annotations

from alpaca_lora.safety.matcher import Matcher
from alpaca_lora.safety.view import Scan, View


def found(matcher: Matcher, *pieces: str) -> list[str]:
    """The matches in a text that comes in pieces."""
    text, view, scan, spans = "".join(pieces), View(matcher.fold), Scan(), []
    for number, piece in enumerate(pieces, 1):
        view.push(piece, final=number == len(pieces))
        spans += matcher.scan(view, scan)
        if not view.final:
            view.forget(scan.at)
    return [text[start:end] for start, end in spans]


def every_way(matcher: Matcher, text: str) -> list[str]:
    """The matches, the same for the whole text, for single characters and for every cut."""
    whole = found(matcher, text)
    assert found(matcher, *text) == whole
    for cut in range(1, len(text)):
        assert found(matcher, text[:cut], text[cut:]) == whole
    return whole
