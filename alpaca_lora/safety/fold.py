"""A text as rules see it: one form for all ways to write the same letters, each character with its place in the text.

Folding is a machine that reads characters in order and remembers what it must, so a text folds to the same whatever
pieces it comes in. A character waits for the next one (an accent may follow); nothing else is held back here, but for
the spaces between single letters.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from dataclasses import dataclass, field

from alpaca_lora.safety.lookalikes import LEET, LOOKALIKES, SIGNS

MOST_DROPPED = 64  # invisible characters in a row; more of them part what stands on both sides
MOST_EXPANDED = 8  # characters that one is folded to; NFKC makes eighteen of one Arabic ligature, and seldom over four
MOST_MARKS = 30  # on one letter, as in Unicode's stream-safe text format (UAX 15); sorting them takes quadratic time
BREAK = "\ufdd0"  # a code point that is no character stands for a flood of invisible ones
JOINED, SOFT = 1, 2  # flags of a folded character: a separator was dropped before it; a digit or sign stood for it

_SIMPLE = r"\t\n\r -~\u3001\u3002\u4e00-\u9fff"  # what NFKC leaves alone
_RUN = re.compile(f"[{_SIMPLE}]+")
_RUN_OF_WORDS = re.compile(r"(?:[!-~\u3001\u3002\u4e00-\u9fff]| (?![\t\n\r ]))+")
_SPACES = re.compile(r"[\t\n\r ]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]+")
_LEET_SIGN = re.compile("[" + re.escape("".join(map(chr, LEET))) + "]")
_TO_SPACE = str.maketrans("\t\n\r", "   ")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_LETTER = rf"[^\W\d_{_CJK}]"
_SIGN = r"[.,*_\-|/~·•+=^'\"`]"
_ONE = rf"(?<={_LETTER})(?<!{_LETTER}{{2}})"  # a single letter stands before
_ONE_NEXT = rf"(?={_LETTER}(?!{_LETTER}))"
_AFTER_CJK = rf"(?<=[{_CJK}])[ \t*_\-|/~·•+.]{{1,3}}"
_SEPARATED = re.compile(
    # white space beside letters that signs part is the space between two words: a b.o.m.b
    rf"{_ONE}(?<!{_LETTER}{_SIGN}{_LETTER})\s{{1,3}}{_ONE_NEXT}(?!{_LETTER}{_SIGN}{_LETTER})"
    rf"|{_ONE}(?:\s?{_SIGN}){{1,3}}\s?{_ONE_NEXT}|{_AFTER_CJK}(?=[{_CJK}])"
)
_MAYBE_SEPARATED = re.compile(rf"{_ONE}(?:\s|{_SIGN}){{1,7}}(?:{_LETTER}{_SIGN}?)?\Z|{_AFTER_CJK}\Z")
_LONGEST_OPEN = 10  # of _MAYBE_SEPARATED, with the letter before it


@dataclass(frozen=True, slots=True)
class Fold:
    """How a text is folded. Always: NFKC, invisible characters dropped, hidden tag characters shown, typographic
    quotes and dashes to those of a keyboard.

    ``case``: upper to lower case. ``lookalikes``: letters that look Latin to Latin, accents of Latin, Greek and
    Cyrillic and marks on Chinese dropped. ``whitespace``: any run of white space to one space. ``leet``: digits and
    signs to letters. ``spacing``: the separators between single letters dropped (``b.o.m.b``).
    """

    case: bool = False
    lookalikes: bool = False
    whitespace: bool = False
    leet: bool = False
    spacing: bool = False


PLAIN = Fold()


@dataclass(slots=True)
class Folded:
    """Folded characters; of each: the first character of the text it stands for, the end of it, flags."""

    text: str = ""
    starts: array[int] = field(default_factory=lambda: array("i"))
    ends: array[int] = field(default_factory=lambda: array("i"))
    flags: bytearray = field(default_factory=bytearray)

    def drop(self, count: int) -> None:
        """Forget the first characters."""
        self.text = self.text[count:]
        del self.starts[:count], self.ends[:count], self.flags[:count]

    def take(self, first: int, last: int) -> Folded:
        """A part of it."""
        return Folded(self.text[first:last], self.starts[first:last], self.ends[first:last], self.flags[first:last])

    def extend(self, other: Folded) -> None:
        """Append what follows."""
        self.text += other.text
        self.starts.extend(other.starts)
        self.ends.extend(other.ends)
        self.flags.extend(other.flags)


class Folder:
    """Folds a text piece by piece: `push`, the last time with ``final``."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold
        self._run = _RUN_OF_WORDS if fold.whitespace else _RUN
        self._waiting = ""  # characters whose folding the next one may change
        self._at = 0  # place of the first of them in the text
        self._dropped = 0  # in a row
        self._after_space = False
        self._unjoined = Folded()  # folded, but separators in it may go yet
        self._num_joined = 0  # of these, the first are done and kept as context

    @property
    def settled(self) -> int:
        """The place in the text before which everything was folded and handed out."""
        waiting = self._unjoined.starts[self._num_joined :]
        return waiting[0] if waiting else self._at

    def push(self, text: str, final: bool = False) -> Folded:
        """What is certain with ``text`` after all that came before."""
        folded = self._read(self._waiting + text, final)
        return self._join(folded, final) if self.fold.spacing else folded

    def _read(self, text: str, final: bool) -> Folded:
        out, pieces, i, n = Folded(), [], 0, len(text)
        while i < n:
            if self.fold.whitespace and (spaces := _SPACES.match(text, i)) and self._shrinks(spaces):
                self._space(out, pieces, i, spaces.end())
                i = spaces.end()
            elif run := self._run.match(text, i):
                end = run.end()
                # the last character may be the first of a cluster
                end -= (not final) if end == n else _is_mark(text[end])
                if end > i:
                    self._plain(out, pieces, text[i:end], self._at + i)
                    i = end
                elif (after := self._cluster(out, pieces, text, i, final)) == i:
                    break
                else:
                    i = after
            elif invisible := _INVISIBLE.match(text, i):
                self._drop(out, pieces, self._at + i, self._at + invisible.end())
                i = invisible.end()
            elif (after := self._cluster(out, pieces, text, i, final)) == i:
                break
            else:
                i = after
        self._waiting = text[i:]
        self._at += i
        out.text = "".join(pieces)
        return out

    def _shrinks(self, spaces: re.Match[str]) -> bool:
        return self._after_space or spaces.group() != " "

    def _space(self, out: Folded, pieces: list[str], first: int, last: int) -> None:
        if not self._after_space:
            self._emit(out, pieces, " ", self._at + first, self._at + first + 1)
            first += 1
        self._drop(out, pieces, self._at + first, self._at + last)

    def _plain(self, out: Folded, pieces: list[str], text: str, at: int) -> None:
        """A run that NFKC leaves alone: each character stands for itself."""
        signs = [found.start() for found in _LEET_SIGN.finditer(text)] if self.fold.leet else []
        offset = len(out.flags)
        out.starts.extend(range(at, at + len(text)))
        out.ends.extend(range(at + 1, at + len(text) + 1))
        out.flags.extend(bytes(len(text)))
        for sign in signs:
            out.flags[offset + sign] = SOFT
        lowered = text.lower() if self.fold.case else text
        pieces.append(lowered.translate(LEET) if signs else lowered)
        self._dropped, self._after_space = 0, text[-1] == " "

    def _cluster(self, out: Folded, pieces: list[str], text: str, i: int, final: bool) -> int:
        """Fold the character at ``i`` with the marks on it; the place after it, or ``i`` where more may follow."""
        end, n = i + 1, len(text)
        while end < n and end - i <= MOST_MARKS and _is_mark(text[end]):
            end += 1
        if end == n and not final and end - i <= MOST_MARKS:
            return i
        folded = _fold_cluster(text[i:end], self.fold)
        if not folded or (folded == " " and self.fold.whitespace and self._after_space):
            self._drop(out, pieces, self._at + i, self._at + end)
            return end
        self._emit(out, pieces, folded, self._at + i, self._at + end)
        if self.fold.leet and _LEET_SIGN.search(unicodedata.normalize("NFKC", text[i:end])):
            out.flags[-1] |= SOFT
        return end

    def _emit(self, out: Folded, pieces: list[str], folded: str, start: int, end: int) -> None:
        pieces.append(folded)
        out.starts.extend([start] * len(folded))
        out.ends.extend([end] * len(folded))
        out.flags.extend(bytes(len(folded)))
        self._dropped, self._after_space = 0, folded[-1] == " "

    def _drop(self, out: Folded, pieces: list[str], first: int, last: int) -> None:
        """Characters that rules do not see; a `BREAK` in place of each that are too many in a row."""
        while first + MOST_DROPPED - self._dropped < last:
            first += MOST_DROPPED - self._dropped
            after_space = self._after_space
            self._emit(out, pieces, BREAK, first, first + 1)
            self._after_space = after_space
            first += 1
        self._dropped += max(last - first, 0)

    def _join(self, folded: Folded, final: bool) -> Folded:
        """Drop separators between single letters; what may become one waits."""
        waiting = self._unjoined
        waiting.extend(folded)
        text, first, last = waiting.text, self._num_joined, len(waiting.text)
        if not final and (maybe := _MAYBE_SEPARATED.search(text, max(last - _LONGEST_OPEN, 0))):
            last = max(maybe.start(), first)
        out, pieces, at, joined = Folded(), [], first, False
        for separators in _SEPARATED.finditer(text, first):
            if separators.start() >= last:
                break
            self._hand_out(out, pieces, at, separators.start(), joined)
            at, joined = separators.end(), True
        self._hand_out(out, pieces, at, last, joined)
        out.text = "".join(pieces)
        kept = max(last - _LONGEST_OPEN, 0)
        waiting.drop(kept)
        self._num_joined = last - kept
        return out

    def _hand_out(self, out: Folded, pieces: list[str], first: int, last: int, joined: bool) -> None:
        part = self._unjoined.take(first, last)
        if joined:
            part.flags[0] |= JOINED
        pieces.append(part.text)
        out.starts.extend(part.starts)
        out.ends.extend(part.ends)
        out.flags.extend(part.flags)


def fold_word(word: str, fold: Fold) -> str:
    """A word of a list as `Folder` would fold it; separators in it stay."""
    return Folder(Fold(fold.case, fold.lookalikes, fold.whitespace, fold.leet)).push(word, final=True).text


def is_letter(character: str) -> bool:
    """A letter of a script that parts words by spaces; Chinese, Japanese and Korean ones are not."""
    return character.isalpha() and not (
        "\u3040" <= character <= "\u30ff"
        or "\u3400" <= character <= "\u9fff"
        or "\uac00" <= character <= "\ud7af"
        or character >= "\U00020000"
    )


def _is_mark(character: str) -> bool:
    """A mark on the character before it, or what else NFKC joins to it: Korean vowels and finals, half-width marks of
    Japanese.
    """
    return character >= "\u0300" and (
        "\u1161" <= character <= "\u11c2"
        or "\uff9e" <= character <= "\uff9f"
        or (unicodedata.category(character)[0] == "M" and not _is_invisible(character))
    )


def _is_invisible(character: str) -> bool:
    code = ord(character)
    if code in (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164) or 0xFE00 <= code <= 0xFE0F or 0xFDD0 <= code <= 0xFDEF:
        return True
    if 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F:
        return True
    return unicodedata.category(character) in ("Cf", "Cc")


@functools.lru_cache(maxsize=8192)
def _fold_cluster(cluster: str, fold: Fold) -> str:
    """A character with its marks, folded; empty when nothing of it can be seen."""
    text = "".join(map(_shown, cluster))
    if fold.lookalikes:
        apart = unicodedata.normalize("NFKD", text)
        if apart and (apart[0] < "\u0530" or "\u3400" <= apart[0] <= "\u9fff"):
            text = "".join(c for c in apart if unicodedata.category(c)[0] != "M")
    text = unicodedata.normalize("NFKC", text)
    if fold.lookalikes:
        text = text.translate(LOOKALIKES)
    if fold.case:
        text = text.casefold()
        text = text.translate(LOOKALIKES) if fold.lookalikes else text
    if fold.leet:
        text = text.translate(LEET)
    text = "".join(map(_shown, text[:MOST_EXPANDED])) if len(cluster) == 1 else "".join(map(_shown, text))
    return text.translate(_TO_SPACE) if fold.whitespace else text


def _shown(character: str) -> str:
    """The character itself, or what it is to a rule."""
    code = ord(character)
    if 0xE0020 <= code <= 0xE007E:
        return chr(code - 0xE0000)  # tags: text that no screen shows and a model reads
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"  # half a pair cannot be written as UTF-8
    if character in "\t\n\r":
        return character
    if character in "\v\f\x85\u2028\u2029":
        return "\n"
    if code == 0x2800 or unicodedata.category(character) == "Zs":
        return " "
    return "" if _is_invisible(character) else SIGNS.get(character, character)
