"""Reads a labelled set: lines of JSON, ``{"text", "language", "side", "categories"}``, to measure a policy with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from typing import Any

from alpaca_lora.errors import DataError
from alpaca_lora.safety.verdict import SIDES, Side

_KEYS = {"text", "language", "side", "categories"}


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and what a perfect policy would find in it: nothing in a benign one."""

    text: str
    language: str
    side: Side
    categories: frozenset[str]


def read_labelled(path: str | PathLike[str]) -> list[LabelledText]:
    """The lines of the file. DataError with file and line for a line that is none."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", file=path) from error
    texts = [_labelled(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise DataError("holds no line", file=path, expected="labelled texts")
    return texts


def _labelled(line: str, path: str | PathLike[str], number: int) -> LabelledText:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError("is not JSON", file=path, line=number, expected="one object on each line") from error
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise DataError("has other keys", file=path, line=number, expected=", ".join(sorted(_KEYS)))
    categories = value["categories"]
    if not isinstance(value["text"], str) or not isinstance(value["language"], str):
        raise DataError("text and language are not text", file=path, line=number, expected="strings")
    if value["side"] not in SIDES:
        raise DataError(
            f"{value['side']!r} is not possible", file=path, line=number, field="side", expected=" or ".join(SIDES)
        )
    if not isinstance(categories, list) or not all(isinstance(category, str) for category in categories):
        raise DataError("is not possible", file=path, line=number, field="categories", expected="a list of names")
    return LabelledText(value["text"], value["language"], value["side"], frozenset(categories))
