"""The adapter_config.json of a stranger, without its expressions: which linears it means, by whole names.

What comes out says the same to `adapters.targets` and `adapters.lora_config`, and gives `re` nothing to do but look for
names. Knows PEFT's keys that select modules; knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from alpaca_lora.adapters.targets import linear_names
from alpaca_lora.errors import AdapterError
from alpaca_lora.inference.name_pattern import MAX_LENGTH, Effort, NamePattern
from alpaca_lora.models.module_names import ALL_LINEAR, HEADS, METACHARACTERS

MAX_ENTRIES = 4096  # of one key; LLaMA-70B has 560 linears
MAX_ENTRY = 512  # characters of one of them
MAX_GROUPS = 100  # of an expression: `re` calls itself for each
_LAYERS_NAME = re.compile(r"[A-Za-z0-9_.]+")


Check = Callable[..., list[str]]  # `lora_config.check_config`, or the same for another type


@dataclass(frozen=True, slots=True)
class AdapterTargets:
    """names: full names in the model's order; config: the same adapter without expressions; messages: what the user
    should be told, entries that name nothing and keys that are not known.
    """

    names: list[str]
    config: dict[str, Any]
    messages: list[str]

    @classmethod
    def find(
        cls, model: nn.Module, config: Mapping[str, Any], check: Check, *, file: str | PathLike[str]
    ) -> AdapterTargets:
        """By the rules of `adapters.targets.peft_targets`; ``check`` refuses what cannot be right besides.

        AdapterError: too many or too long entries, expressions that are not understood (`NamePattern`), no linear.
        """
        for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            _check_size(config, key, file)
        messages = check(config, file=file)
        effort = Effort(file)
        found, problems = _chosen(model, config, effort)
        if not found:
            raise AdapterError(
                "; ".join(problems[:3]) or "names no linear of this model", file=file, field="target_modules",
                fix="is this the right base model?",
            )  # fmt: skip
        plain = {**config, "target_modules": found, "exclude_modules": None, "layers_to_transform": None}
        plain["layers_pattern"] = None
        for key in ("rank_pattern", "alpha_pattern"):
            value = config.get(key)
            # AdaLoRA's rank_pattern is a table of whole names and masks
            if value and not (key == "rank_pattern" and config["peft_type"] == "ADALORA"):
                plain[key] = _by_whole_names(value, found, key, effort)
        messages += [f"{file}: target_modules: {problem}" for problem in problems[:10]]
        return cls(found, plain, messages)


def _check_size(config: Mapping[str, Any], key: str, file: str | PathLike[str]) -> None:
    """Before anything reads the entries, which may be of any type yet."""
    value = config.get(key)
    entries = list(value) if isinstance(value, list | dict) else [value]
    if len(entries) > MAX_ENTRIES:
        raise AdapterError(f"has {len(entries)} entries", file=file, field=key, expected=f"at most {MAX_ENTRIES}")
    longest = MAX_ENTRY if isinstance(value, list | dict) else MAX_LENGTH
    for entry in entries:
        if isinstance(entry, str) and (len(entry) > longest or entry.count("(") > MAX_GROUPS):
            raise AdapterError(
                f"an entry of {len(entry)} characters and {entry.count('(')} groups", file=file, field=key,
                expected=f"at most {longest} characters, {MAX_GROUPS} groups",
            )  # fmt: skip


def _chosen(model: nn.Module, config: Mapping[str, Any], effort: Effort) -> tuple[list[str], list[str]]:
    wanted, excluded, layers = (config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    linears = linear_names(model)
    problems: list[str] = []
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        names = _matching(wanted, linears, "target_modules", effort)
        problems += [] if names else [f"{wanted[:200]!r} matches nothing"]
    else:
        chosen: set[str] = set()
        for entry in [wanted] if isinstance(wanted, str) else _texts(wanted):
            hits = _meant(entry, linears, effort)
            chosen.update(hits)
            problems += [] if hits else [f"{entry!r} matches nothing"]
        names = [name for name in linears if name in chosen]
    if isinstance(excluded, str):
        left_out = set(_matching(excluded, names, "exclude_modules", effort))
        names = [name for name in names if name not in left_out]
    elif excluded:
        ends = _texts(excluded)
        names = [name for name in names if not any(_ends(name, end) for end in ends)]
    if layers not in (None, []) and isinstance(wanted, list):
        numbers = {layers} if isinstance(layers, int) else set(layers)
        patterns = _layer_lists(config.get("layers_pattern"), effort)
        names = [name for name in names if name in wanted or _layer_number(name, patterns) in numbers]
    return names, problems


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _meant(entry: str, names: Sequence[str], effort: Effort) -> list[str]:
    """As `models.module_names.name_matcher`."""
    if entry == ALL_LINEAR:
        return [name for name in names if name.rpartition(".")[2] not in HEADS]
    if METACHARACTERS.isdisjoint(entry):
        effort.step(len(names))
        return [name for name in names if _ends(name, entry)]
    return _matching(entry, names, "target_modules", effort)


def _matching(expression: str, names: Iterable[str], field: str, effort: Effort) -> list[str]:
    pattern = NamePattern(expression, file=effort.file, field=field)
    return [name for name in names if pattern.matches(name, effort)]


def _layer_lists(value: Any, effort: Effort) -> list[list[str]]:
    """The parts of each name of a list of layers. An expression is refused: nobody names layers by one."""
    names = [value] if isinstance(value, str) and value else _texts(value)
    for name in names:
        if not _LAYERS_NAME.fullmatch(name):
            raise AdapterError(
                f"{name[:200]!r} is not the name of a list of layers", file=effort.file, field="layers_pattern",
                expected="for example layers or h",
            )  # fmt: skip
    return [name.split(".") for name in names]


def _layer_number(name: str, lists: Sequence[list[str]]) -> int | None:
    """Number of the layer that a module is in: after one of the ``lists``, else the first in its name."""
    parts = name.split(".")
    for wanted in lists or [[]]:
        for at in range(max(1, len(wanted)), len(parts) - 1):
            if parts[at].isdecimal() and parts[at - len(wanted) : at] == wanted:
                return int(parts[at])
    return None


def _by_whole_names(patterns: Mapping[str, Any], names: Sequence[str], field: str, effort: Effort) -> dict[str, Any]:
    """rank_pattern or alpha_pattern with one entry for each value: an expression that lists the names, nothing else.

    A name belongs to the first pattern that matches its end, as in PEFT.
    """
    compiled = [
        (NamePattern(pattern, file=effort.file, field=field, is_end=True), value) for pattern, value in patterns.items()
    ]
    meant: list[list[str]] = [[] for _ in compiled]
    for name in names:
        for place, (pattern, _) in enumerate(compiled):
            if pattern.matches(name, effort):
                meant[place].append(name)
                break
    found: dict[str, Any] = {}
    for some, (_, value) in zip(meant, compiled, strict=True):
        if some:
            found[f"^(?:{'|'.join(map(re.escape, some))})"] = value
    return found
