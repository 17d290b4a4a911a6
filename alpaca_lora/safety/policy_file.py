"""Reads a policy file: a list of rules, each a flat mapping. Later entries change the rules that were included before.

rules:
  - include: bundled             # or another file beside this one
  - id: personal-data.phone      # a rule that was included: the keys given here replace its own
    enabled: false
  - id: our-names
    kind: words
    words: [Project Bluebird]
    action: redact
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alpaca_lora.config import describe, located
from alpaca_lora.errors import ConfigError, nearest
from alpaca_lora.safety.classifier import Classifier
from alpaca_lora.safety.rule import KINDS, Rule, RuleOptions
from alpaca_lora.yaml_reader import Entry, read_yaml_list

BUNDLED = Path(__file__).parent / "policies" / "bundled.yml"
MAX_DEPTH = 8  # of includes
MAX_SHOWN = 20  # problems in one message

# key -> its value and where it stands, ``file:line``
Written = dict[str, tuple[Any, str]]


def read_rules(path: Path, classifiers: Mapping[str, Classifier]) -> list[Rule]:
    """The rules of a file that are switched on, in its order. One ConfigError with file and line of every problem."""
    problems: list[ConfigError] = []
    rules = []
    for written in _read(path, 0, problems).values():
        try:
            if _is_enabled(written):
                rules.append(_built(written, classifiers))
        except ConfigError as error:
            problems.append(located(error, {key: place for key, (_, place) in written.items()}))
    if problems:
        raise _one_error(problems)
    return rules


def _read(path: Path, depth: int, problems: list[ConfigError]) -> dict[str, Written]:
    """Id -> what is written of the rule, in this file and in those that it includes."""
    rules: dict[str, Written] = {}
    own: dict[str, int] = {}
    for item in read_yaml_list(path, "rules", field="policy"):
        line = min((entry.line for entry in item.values()), default=1)
        if "include" in item:
            rules |= _included(item, path, depth, problems)
            continue
        name = item["id"].value if "id" in item else None
        if not isinstance(name, str):
            problems.append(ConfigError("a rule without an id", file=path, line=line, expected="`id: name`"))
        elif name in own:
            what = f"given twice, on line {own[name]} and on line {line}"
            problems.append(ConfigError(what, file=path, line=line, field=name, fix="delete one of them"))
        elif name not in rules and "kind" not in item:
            hint = nearest(name, rules)
            problems.append(ConfigError(
                f"no rule {name!r} was included before", file=path, line=line, field="id",
                expected="the id of an included rule, or a kind with it",
                fix=f"did you mean {hint[0]!r}?" if hint else None,
            ))  # fmt: skip
        else:
            own[name] = line
            changes = {key: (entry.value, f"{path}:{entry.line}") for key, entry in item.items()}
            rules[name] = rules.get(name, {}) | changes
    return rules


def _included(item: Mapping[str, Entry], path: Path, depth: int, problems: list[ConfigError]) -> dict[str, Written]:
    entry = item["include"]
    if len(item) > 1 or not isinstance(entry.value, str):
        raise ConfigError(
            "an include stands alone", file=path, line=entry.line, field="include", expected="bundled, or a file"
        )
    if depth == MAX_DEPTH:
        raise ConfigError(
            f"more than {MAX_DEPTH} files include each other", file=path, line=entry.line, field="include"
        )
    target = BUNDLED if entry.value == "bundled" else path.parent / entry.value
    if not target.is_file():
        raise ConfigError(
            f"there is no file {str(target)!r}", file=path, line=entry.line, field="include",
            expected="bundled, or a file beside this one",
        )  # fmt: skip
    return _read(target, depth + 1, problems)


def _is_enabled(written: Written) -> bool:
    value, _ = written.get("enabled", (True, ""))
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is not possible", field="enabled", expected="true or false")
    return value


def _built(written: Written, classifiers: Mapping[str, Classifier]) -> Rule:
    """The rule. ConfigError with the field, its place not yet filled in."""
    values = {key: value for key, (value, _) in written.items() if key != "enabled"}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise ConfigError(
            f"{kind!r} is not possible", field="kind", expected=f"one of {', '.join(KINDS)}",
            fix=f"did you mean {hint[0]!r}?" if hint else None,
        )  # fmt: skip
    schema = KINDS[kind]
    if unknown := [key for key in values if key not in schema.model_fields]:
        hint = nearest(unknown[0], [*schema.model_fields, "enabled"])
        raise ConfigError(
            f"unknown key of a rule of kind {kind}", field=unknown[0],
            fix=f"did you mean {hint[0]!r}?" if hint else f"known: {', '.join(schema.model_fields)}",
        )  # fmt: skip
    try:
        return schema.model_validate(values, strict=True).build(classifiers)
    except ValidationError as error:
        raise _field_error(error, schema, str(values["id"])) from error


def _field_error(error: ValidationError, schema: type[RuleOptions], rule: str) -> ConfigError:
    """The first thing that pydantic says, what is wrong before what is missing."""
    details = sorted(error.errors(include_url=False), key=lambda one: one["type"] == "missing")
    detail = details[0]
    key = str(detail["loc"][0]) if detail["loc"] else "id"
    expected = describe(schema.model_fields[key])
    if detail["type"] == "missing":
        return ConfigError(f"the rule {rule!r} has no {key}", field="id", expected=f"{key}: {expected}")
    shown = repr(detail["input"])
    return ConfigError(f"{shown[:60]} is not possible", field=key, expected=expected)


def _one_error(problems: Sequence[ConfigError]) -> ConfigError:
    """All problems, a line each; file and line of the first."""
    if len(problems) == 1:
        return problems[0]
    shown = [str(problem) for problem in problems[:MAX_SHOWN]]
    more = len(problems) - MAX_SHOWN
    error = ConfigError("\n".join([*shown, *([f"and {more} more"] if more > 0 else [])]))
    error.file, error.line, error.field = problems[0].file, problems[0].line, problems[0].field
    return error
