"""Finds the words of a list in a view, all at once and in time proportional to the text (Aho and Corasick 1975)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from alpaca_lora.errors import ConfigError, MachineError
from alpaca_lora.safety.fold import JOINED, SOFT, Fold, Folded, fold_word, is_letter
from alpaca_lora.safety.pattern import MAX_CHARACTERS
from alpaca_lora.safety.view import Place, Scan, Span, View

try:
    import ahocorasick  # pyright: ignore[reportMissingImports]
except ImportError:
    ahocorasick = None

_MAX_TWINS = 4  # letters l of a word that may be written like an i


class WordMatcher:
    """Whole words and phrases of a list; from left to right, the longest of those that begin at one place.

    A word begins and ends where no letter (or digit) stands beside its own; a word of a script without spaces stands
    anywhere.
    """

    def __init__(self, words: Sequence[str], fold: Fold) -> None:
        if ahocorasick is None:
            raise MachineError("pyahocorasick is not installed", fix="pip install 'alpaca-lora[serve]'")
        self.fold = fold
        self._words = ahocorasick.Automaton()
        joined: dict[str, tuple[int, ...]] = {}  # without its spaces -> where they were
        longest = 0
        for word in words:
            folded = fold_word(word.strip(), fold)
            if not folded:
                raise ConfigError(f"{word!r} is no word", expected="a letter, a digit or a sign")
            if len(folded) > MAX_CHARACTERS:
                raise ConfigError(
                    f"{word[:40]!r}... has {len(folded)} characters", expected=f"at most {MAX_CHARACTERS}"
                )
            for twin in _twins(folded) if fold.leet else (folded,):
                self._words.add_word(twin, (len(twin), ()))
                if fold.spacing and " " in twin:
                    joined[twin.replace(" ", "")] = _gaps(twin)
            longest = max(longest, len(folded))
        # where all letters stood apart, the spaces between the words are gone too
        for word, gaps in joined.items():
            if word not in self._words:
                self._words.add_word(word, (len(word), gaps))
        self._words.make_automaton()
        self._longest = longest
        self.most_held = longest + 1

    def scan(self, view: View, scan: Scan) -> list[Span]:
        text, first = view.text, view.first.char
        at = scan.at.char - first
        limit = len(text) if view.final else self._first_open(view.folded, at)
        found = []
        flags = view.folded.flags
        for last, (size, gaps) in self._words.iter(text, at):
            start = last + 1 - size
            alone = at <= start < limit and _begins(view.folded, start) and _ends(view.folded, last + 1)
            if alone and all(flags[start + gap] & JOINED for gap in gaps):
                found.append((start, last + 1))
        spans = []
        for start, end in sorted(found, key=lambda one: (one[0], -one[1])):
            if start >= at:
                spans.append(view.span(first + start, first + end))
                at = end
        at = max(at, limit)
        scan.at = Place(first + at, -1)
        return spans

    def _first_open(self, folded: Folded, at: int) -> int:
        """The first place from which all of the rest begins a word, or is one whose neighbour has not come yet."""
        text = folded.text
        for start in range(max(at, len(text) - self._longest), len(text)):
            if _begins(folded, start) and self._words.longest_prefix(text[start:]) == len(text) - start:
                return start
        return len(text)


def _begins(folded: Folded, start: int) -> bool:
    """A word can begin here: what stands before is no part of it."""
    text, flags = folded.text, folded.flags
    if start == 0 or flags[start] & JOINED or flags[start - 1] & SOFT:
        return True
    return not _one_word(text[start - 1], text[start])


def _ends(folded: Folded, end: int) -> bool:
    text, flags = folded.text, folded.flags
    return end == len(text) or bool(flags[end] & (JOINED | SOFT)) or not _one_word(text[end - 1], text[end])


def _one_word(left: str, right: str) -> bool:
    return (is_letter(left) and is_letter(right)) or (left.isdigit() and right.isdigit())


def _gaps(phrase: str) -> tuple[int, ...]:
    """Where the words of a phrase but the first begin, when its spaces are not counted."""
    lengths = [len(word) for word in phrase.split(" ")]
    return tuple(itertools.accumulate(lengths[:-1]))


def _twins(word: str) -> list[str]:
    """The word with each ``l`` also as ``i``: a 1 is folded to ``i`` and may stand for both."""
    places = [i for i, letter in enumerate(word) if letter == "l"][:_MAX_TWINS]
    twins = []
    for letters in itertools.product("li", repeat=len(places)):
        twin = list(word)
        for place, letter in zip(places, letters, strict=True):
            twin[place] = letter
        twins.append("".join(twin))
    return twins
