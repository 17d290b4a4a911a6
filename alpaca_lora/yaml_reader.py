"""Strict YAML: a flat mapping of keys to scalars or lists of scalars, each with its line, or a list of such. Knows no
schema.

It reads the events of PyYAML's parser and nothing else, so there is no object to construct and no alias to expand.
Scalars follow the core schema of YAML 1.2: ``1e-4`` is a number; ``yes``, ``no``, ``on`` and ``off`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from alpaca_lora.errors import ConfigError

MAX_BYTES = 256 * 1024  # a configuration is some fifty lines; PyYAML reads about 1 MB in a second
MAX_KEYS = 1000
MAX_LIST = 10_000
MAX_DIGITS = 64  # of an integer; longer ones are read as floats (Python refuses to convert 4,300 digits)

Scalar: TypeAlias = str | int | float | bool | None
Value: TypeAlias = Scalar | list[Scalar]
E = TypeVar("E", bound=Event)

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
# 010 is text: it is 8 to YAML 1.1 and 10 to YAML 1.2
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|(0|[1-9][0-9_]*)(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One ``key: value`` of a file; ``line`` is 1-based."""

    key: str
    value: Value
    line: int


def read_yaml(path: Path) -> dict[str, Entry]:
    """The keys of the file at `path`. ConfigError with file and line for anything that is not a flat mapping."""
    return parse_yaml(_decode(path), str(path))


def parse_yaml(text: str, file: str) -> dict[str, Entry]:
    """The keys of `text`; `file` is only named in errors. All duplicate keys are named, with both lines."""
    events = _events(text, file)
    first = next(events, None)
    if first is not None:
        _untagged(first, None, file)
    if first is None or (isinstance(first, ScalarEvent) and first.implicit[0] and first.value in _WORDS):
        return {}
    if not isinstance(first, MappingStartEvent):
        raise ConfigError("the file is not a mapping", file=file, line=_line(first), expected="lines of `key: value`")
    entries = _mapping(events, file)
    for _ in events:  # what follows must be read to be refused
        pass
    return entries


def read_yaml_list(path: Path, key: str, *, field: str) -> list[dict[str, Entry]]:
    """The mappings of a file that holds one key, ``key``, and under it a list of flat mappings. ConfigError with file
    and line for anything else; ``field`` is the option that named the file.
    """
    file = str(path)
    events = _events(_decode(path, field), file)
    for kind in (MappingStartEvent, ScalarEvent, SequenceStartEvent):
        _expect(next(events, None), kind, key, file)
    items: list[dict[str, Entry]] = []
    while not isinstance(event := next(events), SequenceEndEvent):
        _expect(event, MappingStartEvent, key, file)
        if len(items) == MAX_KEYS:
            raise ConfigError(f"more than {MAX_KEYS} entries", file=file, line=_line(event), field=key)
        items.append(_mapping(events, file))
    for event in events:
        if not isinstance(event, MappingEndEvent):
            raise ConfigError("a second key", file=file, line=_line(event), expected=f"`{key}:` and nothing else")
    return items


def _expect(event: Event | None, kind: type[Event], key: str, file: str) -> None:
    """ConfigError when the event is none of ``kind``, or a key other than ``key``."""
    fits = event is not None and isinstance(_untagged(event, key, file), kind)
    if not fits or (isinstance(event, ScalarEvent) and event.value != key):
        line = _line(event) if event is not None else None
        raise ConfigError("is something else", file=file, line=line, expected=f"`{key}:` and a list of mappings")


def _mapping(events: Iterator[Event], file: str) -> dict[str, Entry]:
    """The keys up to the end of the mapping whose start was read. All duplicate keys are refused."""
    entries: dict[str, Entry] = {}
    for event in events:
        if isinstance(event, MappingEndEvent):
            break
        if not isinstance(event, ScalarEvent):
            raise ConfigError("a key that is not text", file=file, line=_line(event), expected="lines of `key: value`")
        key, line = _untagged(event, event.value, file).value, _line(event)
        if key == "<<":
            raise ConfigError("merge keys are not read", file=file, line=line, fix="write the keys out")
        if key in entries:
            raise ConfigError(
                f"given twice, on line {entries[key].line} and on line {line}", file=file, line=line, field=key,
                fix="delete one of them",
            )  # fmt: skip
        if len(entries) == MAX_KEYS:
            raise ConfigError(f"more than {MAX_KEYS} keys", file=file, line=line, expected="a configuration")
        entries[key] = Entry(key, _value(events, key, file), line)
    return entries


def resolve_scalar(text: str) -> Scalar:
    """A plain (unquoted) scalar by YAML 1.2's core schema: null, bool, int, float, else text."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= MAX_DIGITS and _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _value(events: Iterator[Event], key: str, file: str) -> Value:
    event = _untagged(next(events), key, file)
    if isinstance(event, ScalarEvent):
        return _scalar(event)
    if not isinstance(event, SequenceStartEvent):
        raise ConfigError(
            "a mapping where a value is expected", file=file, line=_line(event), field=key,
            expected="a value or a list of values", fix="keys are flat: write them at the start of the line",
        )  # fmt: skip
    items: list[Scalar] = []
    for item in events:
        if isinstance(item, SequenceEndEvent):
            break
        _untagged(item, key, file)
        if not isinstance(item, ScalarEvent):
            raise ConfigError(
                "a list inside of a list", file=file, line=_line(item), field=key, expected="a list of values"
            )
        if len(items) == MAX_LIST:
            raise ConfigError(f"more than {MAX_LIST} values", file=file, line=_line(item), field=key)
        items.append(_scalar(item))
    return items


def _untagged(event: E, key: str | None, file: str) -> E:
    """The event itself; ConfigError when it is an alias or carries a tag."""
    if isinstance(event, AliasEvent):
        what = f"alias *{event.anchor}: aliases are not read"
    elif getattr(event, "tag", None) is not None:
        what = f"tag {event.tag!r}: tags are not read"  # pyright: ignore[reportAttributeAccessIssue]
    else:
        return event
    raise ConfigError(what, file=file, line=_line(event), field=key, fix="write the value itself")


def _scalar(event: ScalarEvent) -> Scalar:
    return resolve_scalar(event.value) if event.implicit[0] else event.value


def _events(text: str, file: str) -> Iterator[Event]:
    """The parser's events inside of the only document; a further document is refused."""
    num_documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise ConfigError("a second document", file=file, line=_line(event), expected="one document")
            if isinstance(event, NodeEvent | CollectionEndEvent):
                yield event
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise ConfigError(f"not YAML: {what}", file=file, line=mark.line + 1 if mark else None) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"control character {chr(error.character)!r}", file=file, line=line, fix="delete it"
        ) from error


def _line(event: Event) -> int:
    return event.start_mark.line + 1


def _decode(path: Path, field: str = "--config") -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError("no such file", file=path, field=field) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path, field=field) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES // 1024} KiB", file=path, expected="a configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"byte {error.start} is not UTF-8", file=path, line=line, fix="save the file as UTF-8"
        ) from error
