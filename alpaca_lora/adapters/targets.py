"""Which linears of a model an adapter sits on: from what the user wrote to full module names, and back for PEFT.

Knows module names and the linear contract; knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from alpaca_lora.errors import ConfigError, nearest
from alpaca_lora.models.linear import LinearContract, PackedLinear
from alpaca_lora.models.module_names import ALL_LINEAR, HEADS, METACHARACTERS, name_matcher


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
    found, problems = match_targets(model, [spec] if isinstance(spec, str) else spec)
    if problems:
        raise ConfigError("; ".join(problems), field="lora_target_modules", expected="names of linears of this model")
    if not found:
        raise ConfigError("names no linear", field="lora_target_modules", expected="at least one name, or all-linear")
    return found


def match_targets(model: nn.Module, entries: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names found, one sentence for each entry that matched nothing or no linear)."""
    linears = linear_names(model)
    modules = dict(model.named_modules())
    found: set[str] = set()
    problems: list[str] = []
    for entry in entries:
        matches = name_matcher(entry, "lora_target_modules")
        hits = [name for name in linears if matches(name)]
        found.update(hits)
        if not hits:
            others = [name for name in modules if name and matches(name)]
            problems.append(_problem(entry, others, modules, linears))
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
    compiled = _compiled(expression, "lora_target_modules")
    return any(compiled.fullmatch(name) for name in names - chosen)


def peft_targets(model: nn.Module, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names, problems) of target_modules, exclude_modules and layers_to_transform of an adapter_config.json."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        expression = _compiled(wanted, "target_modules")
        names = [name for name in linear_names(model) if expression.fullmatch(name)]
        problems = [] if names else [f"{wanted!r} matches nothing"]
    else:
        names, problems = match_targets(model, [wanted] if isinstance(wanted, str) else list(wanted or ()))
    if isinstance(excluded, str):
        expression = _compiled(excluded, "exclude_modules")
        names = [name for name in names if not expression.fullmatch(name)]
    elif excluded:
        names = [name for name in names if not any(name == e or name.endswith("." + e) for e in excluded)]
    layers = config.get("layers_to_transform")
    if layers is not None and layers != [] and not isinstance(wanted, str):
        chosen = {layers} if isinstance(layers, int) else set(layers)
        names = [n for n in names if n in (wanted or ()) or _layer_index(n, config.get("layers_pattern")) in chosen]
    return names, problems


def _compiled(expression: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{expression!r} is not a regular expression: {error}", field=field) from error


def _layer_index(name: str, patterns: str | Iterable[str] | None) -> int | None:
    """Number of the layer that module `name` is in: after the list called `patterns`, else the name's first number."""
    choices = [patterns] if isinstance(patterns, str) else list(patterns or ()) or [r"[^.]*"]
    for pattern in choices:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1))
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


def in_layers(names: Iterable[str], layers: Sequence[int], patterns: Sequence[str] = ()) -> list[str]:
    """Those of ``names`` that lie in one of the decoder layers with these numbers. ConfigError for a number that no
    name has.
    """
    names = list(names)
    numbers = {name: _layer_index(name, list(patterns)) for name in names}
    known = {number for number in numbers.values() if number is not None}
    if missing := sorted(set(layers) - known):
        raise ConfigError(
            f"no target lies in layer {', '.join(map(str, missing))}", field="layers_to_transform",
            expected=f"numbers from {min(known)} to {max(known)}" if known else "targets that lie in numbered layers",
        )  # fmt: skip
    return [name for name in names if numbers[name] in set(layers)]
