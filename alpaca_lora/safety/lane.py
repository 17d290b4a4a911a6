"""Matchers that see a text folded in the same way: they share its view, and one search that says nothing is to be done.

In ordinary text nothing matches. So all expressions of a lane are searched for at once, and one by one only where one
of them has a match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alpaca_lora.safety.expression import Expression
from alpaca_lora.safety.fold import Fold
from alpaca_lora.safety.matcher import Matcher, PatternMatcher
from alpaca_lora.safety.pattern import any_of
from alpaca_lora.safety.view import Place, Scan, Span, View


@dataclass(frozen=True)
class LanePlan:
    """The matchers of a lane, each with the number of its rule; ``any_pattern``: a match of any expression of them."""

    fold: Fold
    matchers: tuple[tuple[int, Matcher], ...]
    any_pattern: Expression | None


class Lane:
    """One text on its way past the matchers of a plan."""

    def __init__(self, plan: LanePlan) -> None:
        self._any = plan.any_pattern
        self._view = View(plan.fold)
        self._scans = [(rule, matcher, Scan()) for rule, matcher in plan.matchers]
        self._of_patterns = [scan for _, matcher, scan in self._scans if isinstance(matcher, PatternMatcher)]
        self._others = [entry for entry in self._scans if not isinstance(entry[1], PatternMatcher)]
        self.limit = 0  # the place in the text before which all was found

    def push(self, text: str, final: bool) -> list[tuple[int, Span]]:
        """The matches that have become certain, with the number of the rule."""
        view = self._view
        view.push(text, final)
        quiet = self._quiet_until()
        if quiet is not None:
            for scan in self._of_patterns:
                scan.at = max(scan.at, quiet)
        scans = self._scans if quiet is None else self._others
        found = [(rule, span) for rule, matcher, scan in scans for span in matcher.scan(view, scan)]
        first = min((scan.at for _, _, scan in self._scans), key=lambda place: place.char)
        self.limit = view.in_text(first.char)
        if not final:
            view.forget(first)
        return found

    def _quiet_until(self) -> Place | None:
        """The place before which no expression has a match, open or certain; None when one has a certain one."""
        if self._any is None:
            return None
        view, least = self._view, min(scan.at for scan in self._of_patterns)
        at = least.byte - view.first.byte
        if self._any.find(view.data, at) is not None:
            return None
        if view.final:
            return view.end
        return view.place_of(view.first.byte + self._any.first_open(view.data, at), least)


def plan_lanes(matchers: Iterable[tuple[int, Matcher]]) -> tuple[LanePlan, ...]:
    """The lanes of matchers that are given with the number of their rule."""
    lanes: dict[Fold, list[tuple[int, Matcher]]] = {}
    for rule, matcher in matchers:
        lanes.setdefault(matcher.fold, []).append((rule, matcher))
    return tuple(LanePlan(fold, tuple(entries), _any_pattern(fold, entries)) for fold, entries in lanes.items())


def _any_pattern(fold: Fold, entries: Sequence[tuple[int, Matcher]]) -> Expression | None:
    patterns = [matcher.pattern for _, matcher in entries if isinstance(matcher, PatternMatcher)]
    return Expression(any_of(patterns), case=not fold.case) if len(patterns) > 1 else None
