"""A regular expression taken apart: how many characters it can take, and the expression of all its beginnings.

Both are found by reading the expression once. The language is RE2's with an upper bound on every repetition, which
makes the time of a search proportional to the text and tells a stream what it must hold back: a suffix of the text that
some match may begin with, and nothing else. No back references, no look-around, no flags inside of the expression.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import NamedTuple

from alpaca_lora.errors import ConfigError

MAX_CHARACTERS = 512  # of one match
MAX_REPEAT = 1000  # RE2's own limit
MAX_SOURCE = 20_000

_QUANTIFIER = re.compile(r"(?:\?|\{(\d{1,4})(?:,(\d{1,4}))?\})\??")
_UNBOUNDED = re.compile(r"[*+]|\{\d+,\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|[pP](?:\{\^?\w+\}|\w)|[dDwWsSabABzfnrtv]|[^\w\s])")
_GROUP = re.compile(r"\((?:\?(?::|P?<\w+>))?")
_ASSERTIONS = {r"\b", r"\B", r"\A", r"\z", "^", "$"}


class Pattern(NamedTuple):
    """``source``: an expression; ``beginnings``: an expression of all that its matches begin with, from nothing to all
    of one; ``least`` and ``most`` characters of a match.
    """

    source: str
    beginnings: str
    least: int
    most: int


def parse_pattern(source: str) -> Pattern:
    """Take an expression apart. ConfigError for what has no bound, can be empty, or is not of the language."""
    if len(source) > MAX_SOURCE:
        raise ConfigError(f"an expression of {len(source)} characters", expected=f"at most {MAX_SOURCE}")
    reader = _Reader(source)
    pattern = reader.alternatives()
    if reader.at < len(source):
        raise reader.error("a ) without its (")
    if pattern.least == 0:
        raise ConfigError(f"{_short(source)} matches no characters at all", expected="at least one character")
    if pattern.most > MAX_CHARACTERS:
        raise ConfigError(
            f"{_short(source)} can take {pattern.most} characters", expected=f"at most {MAX_CHARACTERS}",
            fix="bound it tighter, or put its end into `tail`",
        )  # fmt: skip
    return pattern


def any_of(patterns: list[Pattern]) -> Pattern:
    """One of them; the first that fits wins, as in an alternation."""
    return reduce(_either, patterns)


def _either(left: Pattern, right: Pattern) -> Pattern:
    return Pattern(
        f"{left.source}|{right.source}", f"{left.beginnings}|{right.beginnings}", min(left.least, right.least),
        max(left.most, right.most),
    )  # fmt: skip


class _Reader:
    """Reads an expression from left to right."""

    def __init__(self, source: str) -> None:
        self.source, self.at, self.depth = source, 0, 0

    def alternatives(self) -> Pattern:
        pattern = self.sequence()
        while self.peek() == "|":
            self.at += 1
            pattern = _either(pattern, self.sequence())
        return pattern

    def sequence(self) -> Pattern:
        parts: list[Pattern] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))
        # from the right: the beginnings of a and then b are those of a, and a with those of b
        return reduce(lambda later, part: _then(part, later), reversed(parts), Pattern("", "", 0, 0))

    def atom(self) -> Pattern:
        if self.peek() == "(":
            return self.group()
        if self.peek() == "[":
            return _single(self.take(_CLASS, "a [ without its ]"))
        if self.peek() == "\\":
            escape = self.take(_ESCAPE, "an escape that is not known")
            return Pattern(escape, "", 0, 0) if escape in _ASSERTIONS else _single(escape)
        if self.peek() in "?*+{":
            raise self.error("a repetition of nothing", fix=r"write \{ for a brace")
        character = self.source[self.at]
        self.at += 1
        return Pattern(character, "", 0, 0) if character in _ASSERTIONS else _single(character)

    def group(self) -> Pattern:
        self.take(_GROUP, "a group")
        if self.peek() == "?":
            raise self.error("flags and look-around are not read", fix="case is an option of the rule")
        self.depth += 1
        if self.depth > 50:
            raise self.error("more than 50 groups inside of each other")
        inner = self.alternatives()
        if self.peek() != ")":
            raise self.error("a ( without its )")
        self.at += 1
        self.depth -= 1
        return inner._replace(source=f"(?:{inner.source})", beginnings=f"(?:{inner.beginnings})")

    def repeated(self, part: Pattern) -> Pattern:
        if _UNBOUNDED.match(self.source, self.at):
            raise self.error("a repetition without an upper bound", fix="write {0,64} or {1,64}")
        found = _QUANTIFIER.match(self.source, self.at)
        if found is None:
            if self.peek() == "{":
                raise self.error("a brace that is no repetition", fix=r"write \{")
            return part
        self.at = found.end()
        least = int(found[1]) if found[1] else 0
        most = int(found[2] or found[1] or 1)
        if not least <= most <= MAX_REPEAT or most == 0:
            raise self.error(f"a repetition of {least} to {most}", expected=f"1 to {MAX_REPEAT} at most")
        beginnings = f"(?:{part.source}){{0,{most - 1}}}{part.beginnings}" if most > 1 else part.beginnings
        return Pattern(f"{part.source}{found[0]}", beginnings, part.least * least, part.most * most)

    def peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def take(self, what: re.Pattern[str], missing: str) -> str:
        found = what.match(self.source, self.at)
        if found is None:
            raise self.error(missing)
        self.at = found.end()
        return found.group()

    def error(self, what: str, *, expected: str | None = None, fix: str | None = None) -> ConfigError:
        return ConfigError(f"{_short(self.source)}: at character {self.at + 1}: {what}", expected=expected, fix=fix)


def _single(source: str) -> Pattern:
    return Pattern(source, f"(?:{source})?", 1, 1)


def _then(first: Pattern, later: Pattern) -> Pattern:
    """One after the other."""
    if not later.source:
        return first
    source = first.source + later.source
    if first.most == 0:  # an assertion begins whatever comes after it
        beginnings = f"(?:{first.source}{later.beginnings})?" if later.beginnings else ""
    elif first.beginnings == f"(?:{first.source})?":
        beginnings = f"(?:{first.source}{later.beginnings})?"
    else:
        beginnings = f"(?:{first.source}{later.beginnings}|{first.beginnings})"
    return Pattern(source, beginnings, first.least + later.least, first.most + later.most)


def _short(source: str) -> str:
    return repr(source if len(source) <= 60 else source[:57] + "...")
