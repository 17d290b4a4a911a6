"""The command line as written: flags and their words, in order. Knows no schema, only how words become values.

    --key value    --key=value    --key v1 v2    --key v1 --key v2    --key    --no-key

Dashes and underscores in keys are the same thing. A bare flag has no words; `config` decides what that means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from alpaca_lora.errors import ConfigError
from alpaca_lora.yaml_reader import parse_yaml

_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Flag:
    """One key with every word given for it. ``times``: how often the key was given; ``negated``: as ``--no-key``."""

    key: str
    words: tuple[str, ...]
    times: int = 1
    negated: bool = False


def parse_flags(argv: list[str]) -> tuple[list[str], dict[str, Flag]]:
    """Words before the first flag, and the flags by key. A word with a leading dash is a value if it is a number."""
    positional: list[str] = []
    given: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("-") and word != "-" and not _NUMBER.match(word):
            if not word.startswith("--") or word == "--":
                raise ConfigError(
                    f"unknown flag {word!r}", expected="--key value", fix=f"or --key={word} if it is a value"
                )
            name, equals, value = word[2:].partition("=")
            given.append((name.replace("-", "_"), [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            positional.append(word)
    flags: dict[str, Flag] = {}
    for name, words in given:
        earlier = flags.get(name)
        flags[name] = Flag(name, (*(earlier.words if earlier else ()), *words), earlier.times + 1 if earlier else 1)
    return positional, flags


def split_list(words: tuple[str, ...], key: str, *, commas: bool = True) -> list[str]:
    """The items of a list flag: ``a,b`` or ``[a, b]`` (also cut up by the shell) or several words.

    Commas inside of brackets do not split, so that a regular expression may hold ``{1,3}``; `commas` False: none do.
    """
    joined = " ".join(words)
    if joined.startswith("[") and joined.endswith("]"):
        try:
            items = parse_yaml(f"{key}: {joined}", f"--{key}")[key].value
        except ConfigError as error:
            raise ConfigError(
                f"cannot be read as a list: {joined}", field=f"--{key}", expected="[a, b] or a,b"
            ) from error
        return [item if isinstance(item, str) else str(item) for item in items] if isinstance(items, list) else [joined]
    if not commas:
        return list(words)
    return [item for word in words for item in _split_commas(word)]


def _split_commas(word: str) -> list[str]:
    items, depth, start = [], 0, 0
    for position, character in enumerate(word):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth <= 0:
            items.append(word[start:position])
            start = position + 1
    items.append(word[start:])
    return [item.strip() for item in items if item.strip()]
