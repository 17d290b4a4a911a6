"""Which linears of a model an adapter sits on: from what the user wrote to full module names, and back for PEFT.

Knows module names and the linear contract; knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from torch import nn

from alpaca_lora.errors import ConfigError, nearest
from alpaca_lora.models.linear import LinearContract, PackedLinear
from alpaca_lora.models.module_names import ALL_LINEAR, HEADS, METACHARACTERS, name_matcher
from alpaca_lora.models.name_pattern import Effort, NamePattern

MAX_HINTS = 10  # entries that match nothing for which alike names are looked for, which takes long
_LAYERS_NAME = re.compile(r"[A-Za-z0-9_.]+")


def is_linear(module: nn.Module) -> bool:
    """True for torch's linear and for everything that keeps `models.linear.LinearContract`."""
    return isinstance(module, nn.Linear | LinearContract)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of all linears in the model's order, those inside of another linear (an adapter's base) left out."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = bool(names) and name.startswith(names[-1] + ".")
        if name and is_linear(module) and not inside:
            names.append(name)
    return names


def find_targets(model: nn.Module, spec: Sequence[str] | str) -> list[str]:
    """Full names of the linears that `spec` means, in the model's order.

    Each entry is the end of a name (``q_proj``, ``self_attn.q_proj``), a whole name, a regular expression that matches
    the whole name (whatever holds one of ``* + ? [ ] ( ) { } | ^ $ \\``), or ``all-linear``: every linear but the head.
    ConfigError when an entry matches nothing or something that is no linear; all such entries are listed, with the
    nearest names.
    """
    found, problems = match_targets(model, [spec] if isinstance(spec, str) else spec, "lora_target_modules", Effort())
    if problems:
        raise ConfigError("; ".join(problems), field="lora_target_modules", expected="names of linears of this model")
    if not found:
        raise ConfigError("names no linear", field="lora_target_modules", expected="at least one name, or all-linear")
    return found


def match_targets(
    model: nn.Module, entries: Sequence[str], field: str, effort: Effort
) -> tuple[list[str], list[str]]:  # fmt: skip
    """(names found, one sentence for each entry that matched nothing or no linear)."""
    linears = linear_names(model)
    modules = dict(model.named_modules())
    found: set[str] = set()
    problems: list[str] = []
    for entry in entries:
        matches = name_matcher(entry, field, effort)
        hits = [name for name in linears if matches(name)]
        found.update(hits)
        if not hits and len(problems) < MAX_HINTS:
            others = [name for name in modules if name and matches(name)]
            problems.append(_problem(entry, others, modules, linears))
        elif not hits:
            problems.append(f"{entry!r} matches nothing")
    return [name for name in linears if name in found], problems


def _problem(entry: str, others: list[str], modules: Mapping[str, nn.Module], linears: list[str]) -> str:
    """Why `entry` names no linear, and what may have been meant."""
    if others and is_linear(modules[others[0]]):
        return f"{entry!r} matches {others[0]}, the base of a linear that carries an adapter"
    if others:
        return f"{entry!r} matches {others[0]}, a {type(modules[others[0]]).__name__} and not a linear"
    if entry.rpartition(".")[2] in HEADS:
        return f"{entry!r} matches nothing: the head of this model is its embedding (tied) and has no linear of its own"
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    alike = nearest(entry, [*known, ALL_LINEAR], count=3) or nearest(entry, linears, count=3)
    hint = f"nearest: {', '.join(alike)}" if alike else f"linears here: {', '.join(known[:12]) or 'none'}"
    return f"{entry!r} matches nothing ({hint})"


def peft_spec(model: nn.Module, entries: Sequence[str], targets: Sequence[str]) -> list[str] | str:
    """`target_modules` of an adapter_config.json such that PEFT finds exactly `targets`.

    Plain names stay as they are. A single regular expression stays one string, which is how PEFT marks one, unless it
    also matches what is no target: PEFT tries it on every module and refuses those that are no linear. Anything else
    becomes the shortest names: the last part where every module that ends so is a target, else the whole name.
    """
    plain = all(entry != ALL_LINEAR and METACHARACTERS.isdisjoint(entry) for entry in entries)
    if plain:
        return sorted(set(entries))
    chosen = set(targets)
    if len(entries) == 1 and entries[0] != ALL_LINEAR and not _matches_others(model, entries[0], chosen):
        return entries[0]
    ends: dict[str, bool] = {}
    for name, _ in model.named_modules():
        end = name.rpartition(".")[2]
        ends[end] = ends.get(end, True) and name in chosen
    return sorted({name.rpartition(".")[2] if ends[name.rpartition(".")[2]] else name for name in targets})


def _matches_others(model: nn.Module, expression: str, chosen: set[str]) -> bool:
    """True when the expression matches a module that is no target, here or in another implementation of the model."""
    # an activation is a module elsewhere (transformers' mlp.act_fn), which an open end such as `mlp\..*` would match
    elsewhere = {f"{name.rpartition('.')[0]}.act_fn" for name in chosen}
    names = {name for name, _ in model.named_modules()} | elsewhere
    pattern = NamePattern(expression, Effort(), field="lora_target_modules")
    return any(pattern.matches(name) for name in names - chosen)


def peft_targets(
    model: nn.Module, config: Mapping[str, Any], *, file: str | PathLike[str] | None = None
) -> tuple[list[str], list[str]]:  # fmt: skip
    """(names, problems) of target_modules, exclude_modules and layers_to_transform of an adapter_config.json, which
    ``file`` is. An error for expressions that are not understood or take too long.
    """
    wanted, excluded, effort = config.get("target_modules"), config.get("exclude_modules"), Effort(file)
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        pattern = NamePattern(wanted, effort, field="target_modules")
        names = [name for name in linear_names(model) if pattern.matches(name)]
        problems = [] if names else [f"{wanted[:200]!r} matches nothing"]
    else:
        entries = [wanted] if isinstance(wanted, str) else list(wanted or ())
        names, problems = match_targets(model, entries, "target_modules", effort)
    if isinstance(excluded, str):
        pattern = NamePattern(excluded, effort, field="exclude_modules")
        names = [name for name in names if not pattern.matches(name)]
    elif excluded:
        names = [name for name in names if not any(name == e or name.endswith("." + e) for e in excluded)]
    layers = config.get("layers_to_transform")
    if layers is not None and layers != [] and not isinstance(wanted, str):
        chosen = {layers} if isinstance(layers, int) else set(layers)
        lists = _layer_lists(config.get("layers_pattern"), effort)
        names = [name for name in names if name in (wanted or ()) or _layer_number(name, lists) in chosen]
    return names, problems


def _layer_lists(value: str | Sequence[str] | None, effort: Effort) -> list[list[str]]:
    """The parts of each name of a list of layers; of one list without a name, where none is given. An expression is
    refused: nobody names layers by one.
    """
    names = [value] if isinstance(value, str) and value else list(value or ())
    for name in names:
        if not _LAYERS_NAME.fullmatch(name):
            raise effort.error(
                f"{name[:200]!r} is not the name of a list of layers", "layers_pattern", "for example layers or h"
            )
    return [name.split(".") for name in names] or [[]]


def _layer_number(name: str, lists: Iterable[Sequence[str]]) -> int | None:
    """Number of the layer that a module is in: after one of the ``lists``, the first of them that its name has."""
    parts = name.split(".")
    for wanted in lists:
        for at in range(max(1, len(wanted)), len(parts) - 1):
            if parts[at].isdecimal() and parts[at - len(wanted) : at] == wanted:
                return int(parts[at])
    return None


HEAD_OF_CLASSES = "score"  # Hugging Face's name of a sequence classifier's head


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of what the model does; None for a module that is no language model."""
    if has_class_head(model):
        return "SEQ_CLS"
    return "CAUSAL_LM" if is_language_model(model) and hasattr(model, "lm_head") else None


def is_language_model(model: nn.Module) -> bool:
    """Ours, or transformers'. Names alone do not tell: anybody's module may have a `score` or an `lm_head`."""
    return hasattr(model, "head_weight") or hasattr(model, "prepare_inputs_for_generation")


def has_class_head(model: nn.Module) -> bool:
    """True for a language model that carries a sequence classifier's head."""
    return is_language_model(model) and getattr(model, HEAD_OF_CLASSES, None) is not None


def find_modules(model: nn.Module, entries: Sequence[str], *, field: str = "modules_to_save") -> list[str]:
    """Full names of the modules with weights that the entries name (ends, whole names or regular expressions, as in
    `find_targets`), in the model's order; a classifier's head is always among them. ConfigError when an entry names
    none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if name and (next(module.parameters(), None) is not None or isinstance(module, PackedLinear))
    ]
    found: set[str] = set()
    for entry in entries:
        matches = name_matcher(entry, field)
        hits = [name for name in names if matches(name)]
        if not hits:
            known = dict.fromkeys(name.rpartition(".")[2] for name in names)
            alike = nearest(entry, list(known), count=3)
            fix = f"nearest: {', '.join(alike)}" if alike else None
            if entry.rpartition(".")[2] in HEADS and hasattr(model, "embeddings"):
                fix = "the head is the embedding here (tied): name that one, which trains both"
            raise ConfigError(
                f"{entry!r} names no module with weights", field=field, expected="ends of names of modules", fix=fix
            )
        found.update(hits)
    if has_class_head(model):
        found.add(HEAD_OF_CLASSES)
    return [name for name in names if name in found]


def in_layers(names: Iterable[str], layers: Sequence[int]) -> list[str]:
    """Those of ``names`` that lie in one of the decoder layers with these numbers. ConfigError for a number that no
    name has.
    """
    names = list(names)
    numbers = {name: _layer_number(name, [[]]) for name in names}
    known = {number for number in numbers.values() if number is not None}
    if missing := sorted(set(layers) - known):
        raise ConfigError(
            f"no target lies in layer {', '.join(map(str, missing))}", field="layers_to_transform",
            expected=f"numbers from {min(known)} to {max(known)}" if known else "targets that lie in numbered layers",
        )  # fmt: skip
    return [name for name in names if numbers[name] in set(layers)]
