"""The text of ``alpaca-lora COMMAND --help``: every key with its type, default and description, by room."""

from __future__ import annotations

import inspect
import textwrap

from pydantic.fields import FieldInfo

from alpaca_lora.config import Options, describe, keys_of

WIDTH = 100
INDENT = " " * 6


def command_help(schema: type[Options], command: str, summary: str) -> str:
    """The help page of one command."""
    word = f" [{schema.positional_key.upper()}]" if schema.positional_key else ""
    lines = [
        f"usage: alpaca-lora {command}{word} [--config FILE.yml] [--key value ...] [--json] [--debug]",
        "",
        summary[0].upper() + summary[1:] + ".",
        "Keys are the same in the file and as flags; flags win over the file. Lists: a,b or several values.",
    ]
    rooms: dict[type, list[str]] = {}
    for key in keys_of(schema):
        rooms.setdefault(_room(schema, key), []).append(key)
    for room, keys in rooms.items():
        lines += ["", f"{_title(room)}:"]
        for key in keys:
            lines += _key_lines(key, schema.model_fields[key])
    return "\n".join(lines) + "\n"


def _room(schema: type[Options], key: str) -> type:
    """The class that declares `key`."""
    return next(room for room in schema.__mro__ if key in inspect.get_annotations(room))


def _title(room: type) -> str:
    return room.__name__.removesuffix("Options").removesuffix("Config").lower()


def _key_lines(key: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"default: {_shown(field.get_default(call_default_factory=True))}"
    text = f"{field.description or ''} ({default})".strip()
    return [
        f"  --{key}  {describe(field)}",
        *textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT),
    ]


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value) or "none"
    if value is None or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
