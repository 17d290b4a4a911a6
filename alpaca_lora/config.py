"""Flags over a YAML file over defaults -> one frozen, validated object, and where each value came from.

Keys are flat and the same in the file and on the command line. Each room owns its part of the schema
(``<room>/options.py``); `commands/schemas.py` composes them. All problems of file and flags are found before one error
is raised. Does not import torch.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.table import Table
from yaml.reader import Reader

from alpaca_lora.errors import AlpacaLoraError, ConfigError, nearest
from alpaca_lora.flags import Flag, parse_flags, split_list
from alpaca_lora.yaml_reader import read_yaml, resolve_scalar

CONFIG_KEY = "config"
DEFAULT = "default"  # where a value came from that nobody gave
OTHER_DEFAULT = "default of this method or task"  # a command may default otherwise where another key says so
# what YAML cannot hold, and the line breaks of Unicode that it folds into a space
_UNSAFE = re.compile(Reader.NON_PRINTABLE.pattern + "|[\x85\u2028\u2029\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SHOWN = 20  # problems in one message
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("multiple_of", "a multiple of"))
_WORD_TYPES: Mapping[Any, str] = types.MappingProxyType(
    {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
)
_TRUTH = types.MappingProxyType(
    {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
)


class Options(BaseModel):
    """A room's part of the configuration: flat fields, each with a type, a default and a one-line description.

    A field's limits stand in its ``Field(ge=..., lt=...)``. A check over several fields is a
    ``model_validator(mode="after")`` that raises ``ConfigError(..., field="the_key_to_change")``; `resolve` adds the
    file and line. Where a list is expected one string is read as on the command line: ``a`` or ``a,b``.
    ``Field(json_schema_extra={"commas": False})``: a list flag whose values may hold commas.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    positional_key: ClassVar[str | None] = None  # the key that one word without a flag stands for

    @model_validator(mode="before")
    @classmethod
    def _split_strings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        split = {
            key: _items(split_list((value,), key, commas=_splits_commas(fields[key])), fields[key].annotation)
            if isinstance(value, str) and key in fields and _takes_list(fields[key].annotation)
            else value
            for key, value in data.items()
        }
        for key, value in split.items():
            _refuse_unusable(key, value)
        return split

    def unused(self) -> dict[str, str]:
        """Key -> why it has no effect beside the other values. Given as a flag it is an error, in a file it is said."""
        return {}


def _refuse_unusable(key: str, value: Any) -> None:
    """What no field can use, whatever its type: no room has to think of these."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and item.bit_length() > 63:
            raise ConfigError("the number is too large", field=key, expected="at most 2^63 - 1")
        if isinstance(item, str) and "\0" in item:
            raise ConfigError("holds a NUL character", field=key, fix="delete it")
        if isinstance(item, str) and _SURROGATE.search(item):
            raise ConfigError("is not valid Unicode", field=key, fix="write it in UTF-8")


T = TypeVar("T", bound=Options)
E = TypeVar("E", bound=AlpacaLoraError)


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """What a command runs with. ``origins``: every key -> ``default``, ``configs/x.yml:12`` or ``flag``."""

    value: T
    origins: dict[str, str]
    command: str
    notices: tuple[str, ...] = ()  # what to tell the user

    def to_yaml(self) -> str:
        """The configuration as a file that `resolve` reads back to the same values; origins stand as comments."""
        lines = [f"# alpaca-lora {self.command}, as resolved"]
        lines += [f"{key}: {value}  # {origin}" for key, value, origin in self.rows()]
        return "\n".join(lines) + "\n"

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, value as YAML, origin) of every key, in the order of the rooms."""
        keys = keys_of(type(self.value))
        return [(key, _yaml_value(getattr(self.value, key)), self.origins[key]) for key in keys]


def resolve(schema: type[T], argv: Sequence[str], command: str) -> Resolved[T]:
    """Parse `argv` (the words after the command) and its ``--config`` file into a `schema`.

    Raises one ConfigError that holds every problem, a line each: unknown, duplicate or missing keys, wrong types,
    impossible values.
    """
    problems: list[ConfigError] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys(keys_of(schema), DEFAULT)
    flags = _known_flags(schema, list(argv), command, problems)
    config_path = _config_path(flags.pop(CONFIG_KEY, None))
    if config_path is not None:
        for entry in read_yaml(config_path).values():
            if entry.key in schema.model_fields:
                values[entry.key] = _from_yaml(entry.value, schema.model_fields[entry.key].annotation)
                origins[entry.key] = f"{config_path}:{entry.line}"
            else:
                problems.append(_unknown_key(entry.key, schema, command, file=str(config_path), line=entry.line))
    for key, flag in flags.items():
        origins[key] = "flag"
        try:
            values[key] = _flag_value(flag, schema.model_fields[key])
        except ConfigError as error:
            problems.append(error)
            values.pop(key, None)
            origins[key] = "problem"
    value = _validate(schema, values, origins, problems)
    unused = value.unused() if value is not None else {}
    for key, why in unused.items():
        if origins[key] == "flag":
            problems.append(ConfigError(f"has no effect: {why}", field=f"--{key}", fix="leave it out"))
    if problems:
        raise _one_error(problems)
    assert value is not None
    in_file = {key: why for key, why in unused.items() if origins[key] not in (DEFAULT, "flag")}
    for key, origin in origins.items():
        if origin == DEFAULT and getattr(value, key) != schema.model_fields[key].get_default(call_default_factory=True):
            origins[key] = OTHER_DEFAULT
    return Resolved(value, origins, command, _notices(in_file, str(config_path)))


def _notices(unused: Mapping[str, str], file: str) -> tuple[str, ...]:
    """One line for each reason for which keys of the file have no effect."""
    reasons = dict.fromkeys(unused.values())
    return tuple(
        f"{file}: without effect, because {why}: {', '.join(key for key in unused if unused[key] == why)}"
        for why in reasons
    )


def keys_of(schema: type[Options]) -> list[str]:
    """The keys of a schema, room by room in the order in which the schema names its rooms."""
    declared = [key for room in schema.__mro__ for key in inspect.get_annotations(room)]
    return [key for key in dict.fromkeys(declared) if key in schema.model_fields]


def located(error: E, origins: Mapping[str, str]) -> E:
    """The same error with the file and line, or the flag, that its field came from; itself where it has a place."""
    origin = origins.get(error.field or "")
    if error.file is not None or origin is None or origin in (DEFAULT, OTHER_DEFAULT, "problem"):
        return error
    parts: dict[str, Any] = {"expected": error.expected, "fix": error.fix}
    if origin == "flag":
        return type(error)(error.what, field=f"--{error.field}", **parts)
    file, _, line = origin.rpartition(":")
    return type(error)(error.what, file=file, line=int(line), field=error.field, **parts)


def dump(resolved: Resolved[Any]) -> Table:
    """The resolved configuration as a table of key, value and origin; values that are not defaults stand out."""
    table = Table(title=f"{resolved.command}: configuration", title_justify="left", box=None, pad_edge=False)
    for name in ("key", "value", "from"):
        table.add_column(name, overflow="fold")
    for key, value, origin in resolved.rows():
        table.add_row(key, escape(value), escape(origin), style="dim" if origin == DEFAULT else "bold")
    return table


def describe(field: FieldInfo) -> str:
    """What a field takes, in words, with its limits: ``an integer >= 1``."""
    limits = [
        f"{symbol} {getattr(item, name)}" for item in field.metadata for name, symbol in _BOUNDS if hasattr(item, name)
    ]
    members = [part for part in _parts(field.annotation) if part is not type(None)]
    words = " ".join((" or ".join(map(_describe_type, members)), " and ".join(limits))).strip()
    return f"{words} or null" if type(None) in _members(field.annotation) else words


def _known_flags(schema: type[Options], argv: list[str], command: str, problems: list[ConfigError]) -> dict[str, Flag]:
    """The flags that are keys, ``--no-key`` and the positional word included; the others become problems."""
    positional, flags = parse_flags(argv)
    known: dict[str, Flag] = {}
    for flag in flags.values():
        field = schema.model_fields.get(flag.key)
        positive = flag.key.removeprefix("no_")
        if (
            field is None
            and positive in schema.model_fields
            and bool in _members(schema.model_fields[positive].annotation)
        ):
            if positive in flags:
                problems.append(ConfigError(f"given together with --{flag.key}", field=f"--{positive}", fix="keep one"))
            known[positive] = Flag(positive, flag.words, flag.times, negated=True)
        elif field is None and flag.key != CONFIG_KEY:
            problems.append(_unknown_key(flag.key, schema, command))
        else:
            known.setdefault(flag.key, flag)
    key = schema.positional_key
    if positional and key is not None and key not in known:
        known[key] = Flag(key, tuple(positional))
    elif positional:
        taken = f"--{key}={positional[0]}" if key else "--key value"
        problems.append(ConfigError(f"word {positional[0]!r} without a flag", expected=taken))
    return known


def _config_path(flag: Flag | None) -> Path | None:
    if flag is None:
        return None
    if len(flag.words) != 1:
        raise ConfigError(f"{len(flag.words)} values", field=f"--{CONFIG_KEY}", expected="the path of one YAML file")
    return Path(flag.words[0])


def _flag_value(flag: Flag, field: FieldInfo) -> Any:
    """The words of a flag as a value of the field's type; words that do not fit stay text, for pydantic to refuse."""
    name = f"--no-{flag.key}" if flag.negated else f"--{flag.key}"
    members = _members(field.annotation)
    if _takes_list(field.annotation):
        if not flag.words:
            raise ConfigError("no value", field=name, expected=describe(field))
        words = split_list(flag.words, flag.key, commas=_splits_commas(field))
        return None if words == ["null"] and type(None) in members else _items(words, field.annotation)
    if flag.negated and flag.words:
        raise ConfigError(f"takes no value, {flag.words[0]!r} given", field=name)
    if not flag.words and bool in members:
        return not flag.negated
    if len(flag.words) != 1 or flag.times > 1:
        what = f"{len(flag.words)} values" if flag.words else "no value"
        what = f"given {flag.times} times" if flag.times > 1 else what
        fix = "put a text of several words into quotes" if len(flag.words) > 1 and str in members else None
        raise ConfigError(what, field=name, expected=describe(field), fix=fix)
    return _from_word(flag.words[0], members)


def _items(words: list[str], annotation: Any) -> list[Any]:
    """The words of a list as numbers where its items are numbers; a word that is none stays text."""
    items = [arg for part in _parts(annotation) if get_origin(part) in (list, tuple) for arg in get_args(part)]
    kinds = tuple(kind for item in items for kind in _parts(item))
    return [_from_word(word, kinds) for word in words] if {int, float} & set(kinds) else list(words)


def _from_word(word: str, members: tuple[Any, ...]) -> Any:
    if type(None) in members and (word.lower() == "null" or (word.lower() == "none" and str not in members)):
        return None
    if bool in members and word.lower() in _TRUTH:
        return _TRUTH[word.lower()]
    if int in members or float in members:
        number = resolve_scalar(word)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return number
    return word


def _from_yaml(value: Any, annotation: Any) -> Any:
    """``yes``, ``no``, ``on``, ``off`` are text to the reader; where a field is a bool they still mean one."""
    members = _members(annotation)
    if bool in members and isinstance(value, str) and value.lower() in {"yes", "no", "on", "off"}:
        return _TRUTH[value.lower()]
    return value


def _validate(
    schema: type[T], values: dict[str, Any], origins: dict[str, str], problems: list[ConfigError]
) -> T | None:
    try:
        return schema.model_validate(values, strict=True)
    except ConfigError as error:
        problems.append(located(error, origins))
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for detail in error.errors(include_url=False):
            by_key.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
        order = ["", *origins]
        for key, details in sorted(by_key.items(), key=lambda item: (_rank(item[1]), order.index(item[0]))):
            if origins.get(key) != "problem":  # a flag that was refused already is not missing
                problems.append(_field_problem(key, details, schema, origins))
    return None


def _rank(details: list[Any]) -> bool:
    return details[0]["type"] == "missing"  # what is wrong comes before what is missing


def _field_problem(key: str, details: list[Any], schema: type[Options], origins: dict[str, str]) -> ConfigError:
    """One problem for all that pydantic says of a key (a union fails once for each of its members)."""
    field = schema.model_fields.get(key)
    detail = details[0]
    cause = detail.get("ctx", {}).get("error")
    if field is None or (detail["type"] == "value_error" and cause is not None):
        return located(ConfigError(str(cause or detail["msg"]), field=key or None), origins)
    expected = describe(field)
    if detail["type"] == "missing":
        return ConfigError(
            "missing", field=key, expected=expected, fix=f"give --{key} or write it in the --config file"
        )
    given = detail["input"]
    fix = None
    if isinstance(given, str):
        hint = nearest(given, [str(choice) for choice in _choices(field.annotation)])
        fix = f"did you mean {hint[0]!r}?" if hint else None
    elif detail["type"] == "string_type" and isinstance(given, bool | int | float):
        fix = "put it into quotes if it is text"
    shown = json.dumps(given) if given is None or isinstance(given, bool) else repr(given)  # as YAML spells it
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return located(ConfigError(f"{shown} is not possible", field=key, expected=expected, fix=fix), origins)


def _unknown_key(
    key: str, schema: type[Options], command: str, *, file: str | None = None, line: int | None = None
) -> ConfigError:
    hint = nearest(key, [*schema.model_fields, *([] if file else [CONFIG_KEY])])
    fix = f"did you mean {hint[0]!r}?" if hint else f"`alpaca-lora {command} --help` lists the keys"
    field = key if file else f"--{key}"
    return ConfigError(f"unknown key of {command}", file=file, line=line, field=field, fix=fix)


def _one_error(problems: list[ConfigError]) -> ConfigError:
    """The first problem; more of them follow it in the message, one line each."""
    if len(problems) == 1:
        return problems[0]
    first = problems[0]
    shown = [str(problem) for problem in problems[:MAX_SHOWN]]
    error = ConfigError("\n".join([*shown, *([f"and {more} more"] if (more := len(problems) - MAX_SHOWN) > 0 else [])]))
    error.file, error.line, error.field = first.file, first.line, first.field
    error.expected, error.fix = first.expected, first.fix
    return error


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types a field takes: as `_parts`, with the types of its choices in place of a Literal."""
    parts = _parts(annotation)
    return tuple(t for part in parts for t in (map(type, get_args(part)) if get_origin(part) is Literal else (part,)))


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _takes_list(annotation: Any) -> bool:
    return any(get_origin(member) in (list, tuple) for member in _members(annotation))


def _splits_commas(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("commas") is False)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """All choices of the Literals in a type, also inside of unions and lists."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def _describe_type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        words = f"a list of {_describe_type(get_args(annotation)[0])}"
        return words.replace("of an integer", "of integers").replace("of a number", "of numbers")
    return _WORD_TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _yaml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml_value(item) for item in value) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./+-]*", value) and isinstance(resolve_scalar(value), str):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", quoted)
