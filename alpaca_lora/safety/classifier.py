"""A rule whose judge is a classifier handed in from outside: labels and probabilities of pieces of the text.

The room knows no model: a classifier is a function. A text is judged in pieces of ``window`` characters, each beginning
in the middle of the one before, at the same places however the text comes; a stream holds back at most one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from alpaca_lora.errors import ConfigError
from alpaca_lora.safety.view import Span

# texts -> of each the probability of every label
Classifier: TypeAlias = Callable[[Sequence[str]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class PieceJudge:
    """Pieces are findings when ``label`` has at least the probability ``threshold``."""

    name: str
    classify: Classifier
    label: str
    threshold: float
    window: int

    def spans(self, pieces: Sequence[str], places: Sequence[int]) -> list[Span]:
        """The pieces that are findings; ``places``: where each begins."""
        if not pieces:
            return []
        judged = self.classify(pieces)
        if len(judged) != len(pieces):
            raise ConfigError(f"the classifier {self.name!r} gave {len(judged)} answers for {len(pieces)} texts")
        spans = []
        for piece, place, probabilities in zip(pieces, places, judged, strict=True):
            if self.label not in probabilities:
                known = ", ".join(sorted(probabilities))
                raise ConfigError(
                    f"the classifier {self.name!r} has no label {self.label!r}", expected=f"one of {known}"
                )
            if probabilities[self.label] >= self.threshold:
                spans.append(Span(place, place + len(piece)))
        return spans


@dataclass(slots=True)
class Pieces:
    """One text on its way through a `PieceJudge`; ``at``: no piece that is still to be judged begins before."""

    judge: PieceJudge
    at: int = 0
    _waiting: str = field(default="")

    def push(self, text: str, final: bool) -> list[Span]:
        """The findings among the pieces that are complete now."""
        waiting, stride = self._waiting + text, self.judge.window // 2
        pieces, places, first = list[str](), list[int](), 0
        while len(waiting) - first >= 2 * stride:
            pieces.append(waiting[first : first + 2 * stride])
            places.append(self.at + first)
            first += stride
        # all but the last half of a piece was judged already, unless there was none
        if final and len(waiting) > first and (self.at + first == 0 or len(waiting) - first > stride):
            pieces.append(waiting[first:])
            places.append(self.at + first)
        self.at += first
        self._waiting = waiting[first:]
        return self.judge.spans(pieces, places)
