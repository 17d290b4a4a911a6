"""Texts that a rule lets pass although it finds them: a shop's own address and number among personal data."""

from __future__ import annotations

import re
from collections.abc import Iterable

from alpaca_lora.safety.fold import Fold, Folder

LEAST_DIGITS = 7  # of the end of a number that is let pass with the number
_NUMBER = re.compile(r"[+()\d\s./\-]+")
_NO_DIGIT = re.compile(r"\D+")


class Allowed:
    """Knows a found text when it is one of ``texts``, whatever the case and the white space; of a number the digits
    count, and its end is let pass with it, since that says nothing more.
    """

    def __init__(self, texts: Iterable[str], fold: Fold) -> None:
        plain = [_plain(Folder(fold).push(text, final=True).text) for text in texts]
        self._texts = frozenset(plain)
        self._numbers = tuple(text for text in plain if text.isdecimal())

    def __contains__(self, found: object) -> bool:
        if not isinstance(found, str):
            return False
        plain = _plain(found)
        is_end = plain.isdecimal() and len(plain) >= LEAST_DIGITS
        return plain in self._texts or (is_end and any(number.endswith(plain) for number in self._numbers))


def _plain(text: str) -> str:
    """The digits of a number; of anything else what is read."""
    return _NO_DIGIT.sub("", text) if _NUMBER.fullmatch(text) else " ".join(text.casefold().split())
