"""Reads a template file: JSON or YAML ``{description, prompt_input, prompt_no_input, response_split}``, or a Jinja chat
template. Knows the file, not what a template does.

``response_split`` is read for compatibility and not needed: answers are decoded from the new tokens, so nothing has to
be split off.
"""

from __future__ import annotations

import json
from pathlib import Path

from alpaca_lora.errors import ConfigError, nearest
from alpaca_lora.yaml_reader import Entry, parse_yaml

_REQUIRED = ("prompt_input", "prompt_no_input")
_OPTIONAL = ("description", "response_split")
_MAX_BYTES = 1_000_000


def read_template_file(path: Path) -> dict[str, str]:
    """The strings of the file; a ``.jinja`` file gives ``{"chat_template": text}``. Raises ConfigError."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"is larger than {_MAX_BYTES} bytes", file=path, expected="a template file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", file=path, field="prompt_template_name", expected="a template file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start} is not UTF-8", file=path, expected="a template file in UTF-8") from error
    if path.suffix == ".jinja":
        return {"chat_template": text}
    entries = _json(path, text) if path.suffix == ".json" else parse_yaml(text, str(path))
    for key, entry in entries.items():
        if key not in (*_REQUIRED, *_OPTIONAL):
            hint = nearest(key, (*_REQUIRED, *_OPTIONAL))
            raise ConfigError(
                "unknown key", file=path, line=entry.line, field=key,
                expected=f"one of {', '.join(_REQUIRED + _OPTIONAL)}",
                fix=f"did you mean {hint[0]!r}?" if hint else None,
            )  # fmt: skip
        if not isinstance(entry.value, str):
            raise ConfigError("is not text", file=path, line=entry.line, field=key, expected="a string")
    for key in _REQUIRED:
        if key not in entries:
            raise ConfigError("is missing", file=path, field=key, expected=f"the keys {', '.join(_REQUIRED)}")
    return {"response_split": "### Response:"} | {key: str(entry.value) for key, entry in entries.items()}


def _json(path: Path, text: str) -> dict[str, Entry]:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda found: found)
    except json.JSONDecodeError as error:
        raise ConfigError(error.msg, file=path, line=error.lineno, expected="JSON") from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply", file=path, expected="a template file") from error
    if not text.lstrip().startswith("{"):
        raise ConfigError("is not an object", file=path, expected=f"the keys {', '.join(_REQUIRED)}")
    entries: dict[str, Entry] = {}
    for key, value in pairs:
        line = text[: max(text.find(json.dumps(key, ensure_ascii=False)), 0)].count("\n") + 1
        if key in entries:
            raise ConfigError("given twice", file=path, line=line, field=key, fix="delete one of them")
        entries[key] = Entry(key, value, line)
    return entries
