"""A folded text that matchers look at while it grows: characters and UTF-8, places in both, the way back to the text.

Places are counted from the start of the folded text, however much of it was forgotten already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from alpaca_lora.safety.fold import Fold, Folded, Folder


class Place(NamedTuple):
    """A place in a folded text, in characters and in bytes of UTF-8."""

    char: int = 0
    byte: int = 0


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (not included) of the text, not of the folded one."""

    start: int
    end: int


@dataclass(slots=True)
class Scan:
    """How far one matcher has come in one view; all that begins before ``at`` was found."""

    at: Place = field(default=Place())


class View:
    """The folded text between what is forgotten and what has come so far."""

    def __init__(self, fold: Fold) -> None:
        self.folded = Folded()
        self.data = b""  # the same in UTF-8
        self.first = Place()  # where both begin
        self.final = False
        self._folder = Folder(fold)

    def push(self, text: str, final: bool) -> None:
        """More text; with ``final`` the last."""
        folded = self._folder.push(text, final)
        self.folded.extend(folded)
        self.data += folded.text.encode()
        self.final = final

    @property
    def text(self) -> str:
        return self.folded.text

    @property
    def end(self) -> Place:
        return Place(self.first.char + len(self.text), self.first.byte + len(self.data))

    def place_of(self, byte: int, known: Place) -> Place:
        """The place of a byte, counted on from a ``known`` one that is not behind it."""
        between = self.data[known.byte - self.first.byte : byte - self.first.byte]
        return Place(known.char + (len(between) if between.isascii() else len(between.decode())), byte)

    def span(self, start: int, end: int) -> Span:
        """Folded characters ``start`` to ``end`` in the text; an accent or a ligature is never cut apart."""
        return Span(self.folded.starts[start - self.first.char], self.folded.ends[end - 1 - self.first.char])

    def in_text(self, char: int) -> int:
        """The place in the text before which nothing of the folded characters from ``char`` on stands."""
        index = char - self.first.char
        return self.folded.starts[index] if index < len(self.text) else self._folder.settled

    def forget(self, before: Place) -> None:
        """Drop what stands before a place, but for the character before it, which decides if a word begins there."""
        count = before.char - self.first.char - 1
        if count > 0:
            size = len(self.text[:count].encode())
            self.folded.drop(count)
            self.data = self.data[size:]
            self.first = Place(self.first.char + count, self.first.byte + size)
