"""Regular expressions over module names, matched in bounded time: a stranger's adapter brings some.

Python's `re` tries one way after the other: ``(a+)+$`` takes years on a name of 60 letters, and nothing interrupts it.
Here a set of places goes through the expression, as the bits of a number (bit i: before character i), so that no place
is looked at twice for the same part. Understood is what files of adapters are written with: literals, ``.``, classes,
``\\d \\w \\s``, ``^ $ \\A \\Z \\b``, groups, ``|``, ``* + ? {m,n}``, lazy or not, and looking ahead (``(?=`` and
``(?!``). All else (back references, looking behind, flags) is refused. Knows no adapter and no model.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import partial
from os import PathLike

from alpaca_lora.errors import AdapterError, ConfigError, UserError

MAX_LENGTH = 2000  # of an expression; those of target_modules that trainers write have up to 500 characters
MAX_DEPTH = 40  # groups inside of groups
MAX_REPEATS = 1000
MAX_STEPS = 2_000_000  # of the expressions that share an `Effort`; about a second
_ASCII = frozenset(map(chr, range(128)))
_CLASSES = {
    "d": frozenset(string.digits),
    "w": frozenset(string.ascii_letters + string.digits + "_"),
    "s": frozenset(" \t\n\r\f\v"),
}
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.\-]|\\[^A-Za-z0-9])*\$?")
_BRACES = re.compile(r"\{(\d{0,6})(?:(,)(\d{0,6}))?\}")


class Effort:
    """What is left of the steps that some expressions may take together, to be read and to be matched. Those of
    ``file`` raise AdapterError, those of the user ConfigError.
    """

    def __init__(self, file: str | PathLike[str] | None = None, *, steps: int = MAX_STEPS) -> None:
        self.file, self.left = file, steps

    def step(self, field: str, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise self.error(
                "expressions of module names take too long", field, "names, or simple expressions",
                "write the names of the modules themselves",
            )  # fmt: skip

    def error(self, what: str, field: str, expected: str, fix: str | None = None) -> UserError:
        if self.file is None:
            return ConfigError(what, field=field, expected=expected, fix=fix)
        return AdapterError(what, file=self.file, field=field, expected=expected, fix=fix)


class _Walk:
    """One name on its way through an expression."""

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self.name, self.end, self.step = name, len(name), step
        self._where: dict[frozenset[str], int] = {}

    def where(self, accepted: frozenset[str]) -> int:
        """Places before a character that is accepted."""
        found = self._where.get(accepted)
        if found is None:
            found = self._where[accepted] = sum(1 << i for i, c in enumerate(self.name) if c in accepted)
        return found

    def borders(self) -> int:
        """Places between a letter of a word and something else."""
        word = self.where(_CLASSES["w"])
        return word ^ (word << 1)


Node = Callable[[_Walk, int], int]  # (walk, places where it may begin) -> places where it may end


class NamePattern:
    """One expression of the key ``field``. An error, of the kind that ``effort`` says, for one that is not understood.

    ``is_end``: it means the end of a name, as in PEFT's rank_pattern and alpha_pattern, in place of the whole name.
    """

    def __init__(self, text: str, effort: Effort, *, field: str, is_end: bool = False) -> None:
        self.text, self._effort, self._field, self._plain, self._node = text, effort, field, None, None
        if len(text) > MAX_LENGTH:
            raise effort.error(f"an expression of {len(text)} characters", field, f"at most {MAX_LENGTH}")
        effort.step(field, len(text))
        if _PLAIN.fullmatch(text):
            # nothing in it repeats, so `re` is quick, and names are by far the most of what is asked
            self._plain = re.compile(rf"(.*\.)?({text})" if is_end else text)
            return
        try:
            node = _Parser(text).parse()
        except _NotUnderstood as error:
            raise effort.error(
                f"{text[:200]!r} is not a regular expression: {error}", field,
                "names, or expressions of names with . [] () | * + ? {} \\d \\w only", r"for example '.*\.(q|v)_proj'",
            ) from error  # fmt: skip
        before = _repeat(_sequence([_repeat(_characters(_ASCII), 0, None), _characters(frozenset("."))]), 0, 1)
        self._node = _sequence([before, node]) if is_end else node

    def matches(self, name: str) -> bool:
        """Whether it is this name, or its end. An error when the `Effort` is used up."""
        self._effort.step(self._field)
        if self._plain is not None:
            return self._plain.fullmatch(name) is not None
        assert self._node is not None
        walk = _Walk(name, partial(self._effort.step, self._field))
        return bool(self._node(walk, 1) >> walk.end & 1)


# ---- what expressions are made of


def _characters(accepted: frozenset[str]) -> Node:
    def node(walk: _Walk, places: int) -> int:
        walk.step()
        return (places & walk.where(accepted)) << 1

    return node


def _sequence(parts: list[Node]) -> Node:
    def node(walk: _Walk, places: int) -> int:
        for part in parts:
            if not places:
                return 0
            places = part(walk, places)
        return places

    return node if len(parts) != 1 else parts[0]


def _either(choices: list[Node]) -> Node:
    def node(walk: _Walk, places: int) -> int:
        found = 0
        for choice in choices:
            found |= choice(walk, places)
        return found

    return node if len(choices) != 1 else choices[0]


def _repeat(body: Node, least: int, most: int | None) -> Node:
    def node(walk: _Walk, places: int) -> int:
        for _ in range(least):
            walk.step()
            if not (places := body(walk, places)):
                return 0
        found = new = places
        rounds = least
        # a place that was reached in fewer rounds has all the ways on that it will have in more
        while new and (most is None or rounds < most):
            walk.step()
            new = body(walk, new) & ~found
            found |= new
            rounds += 1
        return found

    return node


def _ahead(body: Node, wanted: bool) -> Node:
    def node(walk: _Walk, places: int) -> int:
        found = 0
        for place in range(walk.end + 1):
            walk.step()
            if places >> place & 1 and bool(body(walk, 1 << place)) is wanted:
                found |= 1 << place
        return found

    return node


_PLACES: dict[str, Node] = {
    "A": lambda walk, places: places & 1,
    "Z": lambda walk, places: places & (1 << walk.end),
    "b": lambda walk, places: places & walk.borders(),
    "B": lambda walk, places: places & ~walk.borders(),
}


# ---- from the text to those


class _NotUnderstood(Exception):
    """Why an expression is refused."""


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> Node:
        node = self._choices(0)
        if self._at < len(self._text):
            raise _NotUnderstood("a ) without its (")
        return node

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _takes(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _next(self) -> str:
        if not (sign := self._peek()):
            raise _NotUnderstood("it ends too early")
        self._at += 1
        return sign

    def _choices(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _NotUnderstood(f"more than {MAX_DEPTH} groups inside of each other")
        choices: list[Node] = []
        while True:
            parts: list[Node] = []
            while self._peek() not in ("", "|", ")"):
                parts.append(self._repeated(self._single(depth)))
            choices.append(_sequence(parts))
            if not self._takes("|"):
                return _either(choices)

    def _repeated(self, body: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return body
        least, most = bounds
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            raise _NotUnderstood(f"a repetition of {least} to {most}, expected at most {MAX_REPEATS}")
        self._takes("?")  # lazy: another order, the same names
        if self._peek() in ("*", "+", "?") or self._is_braces():
            raise _NotUnderstood("a repetition of a repetition without brackets is not understood here")
        return _repeat(body, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return bounds
        if not self._is_braces():
            return None
        match = _BRACES.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        least = int(match[1] or 0)
        return least, least if match[2] is None else int(match[3]) if match[3] else None

    def _is_braces(self) -> bool:
        match = _BRACES.match(self._text, self._at)
        return match is not None and match[0] not in ("{}",)

    def _single(self, depth: int) -> Node:
        sign = self._next()
        if sign == "(":
            return self._group(depth)
        if sign == "[":
            return _characters(self._class())
        if sign == "\\":
            return self._escaped()
        if sign == ".":
            return _characters(_ASCII - {"\n"})
        if sign in "^$":
            return _PLACES["A" if sign == "^" else "Z"]
        if sign in "*+?":
            raise _NotUnderstood("a repetition of nothing")
        return _characters(frozenset(sign))

    def _group(self, depth: int) -> Node:
        ahead: bool | None = None
        if self._takes("?"):
            if self._takes("=") or self._takes("!"):
                ahead = self._text[self._at - 1] == "="
            elif self._takes("P<"):
                while self._next() != ">":
                    pass
            elif not self._takes(":"):
                raise _NotUnderstood(f"a group that begins with (?{self._peek()} is not understood here")
        node = self._choices(depth + 1)
        if not self._takes(")"):
            raise _NotUnderstood("a ( without its )")
        return node if ahead is None else _ahead(node, ahead)

    def _escaped(self) -> Node:
        sign = self._next()
        if sign in _PLACES:
            return _PLACES[sign]
        return _characters(self._escaped_class(sign))

    @staticmethod
    def _escaped_class(sign: str) -> frozenset[str]:
        if (found := _CLASSES.get(sign.lower())) is not None:
            return found if sign.islower() else _ASCII - found
        if sign.isalnum():
            raise _NotUnderstood(f"\\{sign} is not understood here")
        return frozenset(sign)

    def _class(self) -> frozenset[str]:
        negated = self._takes("^")
        accepted: set[str] = set()
        is_first = True
        while is_first or not self._takes("]"):
            is_first = False
            sign = self._next()
            single = self._escaped_class(self._next()) if sign == "\\" else frozenset(sign)
            if len(single) == 1 and self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._next()
                if last == "\\":
                    last = min(self._escaped_class(self._next()))
                (first,) = single
                if not first <= last or last > "\x7f":
                    raise _NotUnderstood(f"the range {first}-{last}")
                single = frozenset(map(chr, range(ord(first), ord(last) + 1)))
            accepted |= single
        return _ASCII - accepted if negated else frozenset(accepted)
