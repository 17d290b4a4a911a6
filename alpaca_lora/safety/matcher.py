"""Finds the matches of an expression in a view, as far as the text that is there makes them certain.

A match is certain when no more text can change it: nothing that begins at or before it reaches the end of the text.
What reaches the end is found by searching, backwards from the end, for the expression of all beginnings (`pattern.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from alpaca_lora.safety.allowed import Allowed
from alpaca_lora.safety.expression import Expression, compiled, next_character
from alpaca_lora.safety.fold import PLAIN, Fold
from alpaca_lora.safety.pattern import Pattern
from alpaca_lora.safety.view import Scan, Span, View

MAX_TAIL = 8192  # bytes of UTF-8 by which a tail stretches a match

# the candidate -> how many of its characters are the thing itself, 0 when it is not
Accept = Callable[[str], int]


class Matcher(Protocol):
    """Something that a rule looks for in texts folded in its way."""

    @property
    def fold(self) -> Fold:
        """How it wants the text folded."""
        ...

    @property
    def most_held(self) -> int:
        """Folded characters that are held back at most while a match is open."""
        ...

    def scan(self, view: View, scan: Scan) -> list[Span]:
        """The matches that have become certain, in order; ``scan`` moves to where the rest may begin."""
        ...


class PatternMatcher:
    """Matches of an expression, from left to right; each is searched from the end of the one before.

    ``tail``: an expression that stretches a match as often as it fits, up to `MAX_TAIL` bytes. ``accept``: judges a
    candidate; where it refuses, the search goes on one character later. Case differs where the fold keeps it.
    """

    def __init__(
        self, pattern: Pattern, fold: Fold = PLAIN, *, tail: Pattern | None = None, accept: Accept | None = None
    ) -> None:
        case = not fold.case
        self.fold = fold
        self.pattern = pattern
        self.most_held = (MAX_TAIL if tail else 0) + pattern.most + 1
        self._expression = Expression(pattern, case=case)
        self._accept = accept
        self._allowed: Allowed | None = None
        self._tail = None if tail is None else compiled(f"(?:{tail.source})*", case=case)
        self._open_tail = None if tail is None else compiled(rf"(?:{tail.source})*(?:{tail.beginnings})\z", case=case)

    def allowing(self, texts: Sequence[str]) -> Self:
        """The same, but that it keeps quiet about matches that are one of ``texts``."""
        other = copy.copy(self)
        other._allowed = Allowed(texts, self.fold)
        return other

    def scan(self, view: View, scan: Scan) -> list[Span]:
        data, base, known = view.data, view.first.byte, scan.at
        at, spans = scan.at.byte - base, []
        first_open = self._first_open(view, at)
        while (found := self._expression.find(data, at)) is not None:
            start, end = found
            if first_open < at:  # it was inside of the match before
                first_open = self._first_open(view, at)
            if first_open <= start:
                break
            if self._accept is not None:
                kept = self._accept(data[start:end].decode())
                if not kept:
                    at = next_character(data, start)
                    continue
                end = start + len(data[start:end].decode()[:kept].encode())
            stretched = self._stretched(data, end, view.final)
            if stretched is None:
                scan.at = view.place_of(base + start, known)
                return spans
            first = view.place_of(base + start, known)
            known = view.place_of(base + stretched, first)
            if self._allowed is None or data[start:stretched].decode() not in self._allowed:
                spans.append(view.span(first.char, known.char))
            at = stretched
        if first_open < at:
            first_open = self._first_open(view, at)
        scan.at = view.place_of(base + first_open, known)
        return spans

    def _first_open(self, view: View, at: int) -> int:
        return len(view.data) if view.final else self._expression.first_open(view.data, at)

    def _stretched(self, data: bytes, end: int, final: bool) -> int | None:
        """The end of a match with its tail; None while it may go on."""
        if self._tail is None or self._open_tail is None:
            return end
        limit = min(end + MAX_TAIL, len(data))
        if not final and limit < end + MAX_TAIL and self._open_tail.match(data, end) is not None:
            return None
        return self._tail.match(data, end, limit).end()


def finds(matcher: Matcher, text: str) -> bool:
    """Whether there is a match in a whole text."""
    view = View(matcher.fold)
    view.push(text, final=True)
    return bool(matcher.scan(view, Scan()))
