"""What an adapter_config.json of type LORA says: its keys, and the rank and scale of each module.

Knows PEFT's `LoraConfig` (version 0.21) and which of its keys change the numbers: those that are not built are refused.
Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError
from alpaca_lora.models.name_pattern import Effort, NamePattern

# What we write: understood by every PEFT since 0.7 and by the servers that read its files.
DEFAULTS: Mapping[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 8, "rank_pattern": {},
    "revision": None, "target_modules": None, "task_type": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip
NO_TARGETS = "dummy-target-modules"  # PEFT's word for a file without an update of low rank: whole modules, biases
# What a file may say besides, as long as it says nothing (None, False, empty): each of these changes the numbers.
REFUSED = (
    "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# Known and without effect on a finished adapter.
IGNORED = (
    "peft_version", "exclude_modules", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "runtime_config", "target_modules_to_tie",
)  # fmt: skip
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part out of its weights.
MAX_ALPHA = 1e6  # far from what float32 cannot hold
MAX_ENTRIES = 4096  # of one key; LLaMA-70B has 560 linears
MAX_ENTRY = 512  # characters of one of them
_SELECTING = (
    "target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "feedforward_modules",
)  # fmt: skip
SAFE_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one module: its rank and the factor of its update."""

    rank: int
    scale: float


def check_config(config: Mapping[str, Any], *, file: str | PathLike[str] | None = None) -> list[str]:
    """Refuse what cannot be right or is not built; return what the user should be told (keys that nobody here knows).

    ConfigError with the names of our flags when the values came from the user, AdapterError with the file when they
    came from one.
    """
    check_sizes(config, file)
    effort = Effort(file)
    _check_number(config, "r", file, "a whole number of at least 1", lambda v: type(v) is int and v >= 1)
    _check_number(config, "lora_alpha", file, f"a number above 0, at most {MAX_ALPHA:g}", _is_alpha)
    _check_number(config, "lora_dropout", file, "at least 0 and below 1", lambda v: _is_finite(v) and 0 <= v < 1)
    for key, item, meets in (
        ("rank_pattern", "whole numbers of at least 1", lambda v: type(v) is int and v >= 1),
        ("alpha_pattern", f"numbers above 0, at most {MAX_ALPHA:g}", _is_alpha),
    ):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(meets(v) for v in value.values()):
            raise _error(file, key, f"is {repr(value)[:200]}", f"a table of patterns and {item}")
        for pattern in value:
            NamePattern(pattern, effort, field=key, is_end=True)
    targets = config.get("target_modules")
    if not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        raise _error(file, "target_modules", f"is {repr(targets)[:200]}", "names or a regular expression")
    _check_selection(config, file, effort)
    _refuse_unbuilt(config, file)
    known = {*DEFAULTS, *REFUSED, *IGNORED}
    return [
        f"{'' if file is None else f'{file}: '}{key}: unknown key, kept as it is and not used"
        for key in sorted(config)
        if key not in known
    ]


def check_sizes(config: Mapping[str, Any], file: str | PathLike[str] | None) -> None:
    """The keys that name modules: no more entries, and no longer ones, than somebody can have meant. They may be of any
    type yet.
    """
    for key in _SELECTING:
        value = config.get(key)
        if not isinstance(value, list | dict):
            continue
        if len(value) > MAX_ENTRIES:
            raise _error(file, key, f"has {len(value)} entries", f"at most {MAX_ENTRIES}")
        for entry in value:
            if isinstance(entry, str) and len(entry) > MAX_ENTRY:
                raise _error(file, key, f"an entry of {len(entry)} characters", f"at most {MAX_ENTRY}")


def _check_selection(config: Mapping[str, Any], file: str | PathLike[str] | None, effort: Effort) -> None:
    """The keys beside target_modules that say which modules: their types, and that expressions are expressions."""
    for key, item, words in (
        ("exclude_modules", str, "names or a regular expression"),
        ("layers_pattern", str, "names of lists of layers"),
        ("layers_to_transform", int, "numbers of layers"),
    ):
        value = config.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is item for one in items):
            raise _error(file, key, f"is {repr(value)[:200]}", words)
    if isinstance(excluded := config.get("exclude_modules"), str):
        NamePattern(excluded, effort, field="exclude_modules")
    targets = config["target_modules"]
    if file is not None and isinstance(targets, str):
        NamePattern(targets, effort, field="target_modules")


def _refuse_unbuilt(config: Mapping[str, Any], file: str | PathLike[str] | None) -> None:
    for key in REFUSED:
        if config.get(key) not in (None, False, [], {}, ""):
            raise _error(file, key, f"{config[key]!r} is not supported", "nothing, or the key left out")
    if config.get("bias", "none") != "none":
        raise _error(file, "bias", f"{config['bias']!r} is not supported", "none")
    start = config.get("init_lora_weights", True)
    if not any(start is safe or (isinstance(start, str) and start == safe) for safe in SAFE_INITIALISATIONS):
        raise _error(
            file, "init_lora_weights",
            f"{start!r} takes a part out of the base weights, which is not supported",
            "an adapter for the base as it is",
            "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )  # fmt: skip


def settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Setting]:
    """Rank and scale of each module: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, equation 6).

    As in PEFT, the first entry of rank_pattern or alpha_pattern that matches the end of the name takes the place of r
    or lora_alpha.
    """
    ranks, alphas = (end_patterns(config, key) for key in ("rank_pattern", "alpha_pattern"))
    found: dict[str, Setting] = {}
    for name in names:
        rank = _by_pattern(ranks, name, config["r"])
        alpha = _by_pattern(alphas, name, config["lora_alpha"])
        found[name] = Setting(rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return found


def end_patterns(config: Mapping[str, Any], key: str) -> list[tuple[NamePattern, Any]]:
    """The entries of rank_pattern or alpha_pattern, which mean ends of names, in their order."""
    effort = Effort()
    return [
        (NamePattern(text, effort, field=key, is_end=True), value) for text, value in (config.get(key) or {}).items()
    ]


def _by_pattern(patterns: Iterable[tuple[NamePattern, Any]], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.matches(name)), default)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_alpha(value: Any) -> bool:
    return _is_finite(value) and 0 < value <= MAX_ALPHA


def _check_number(
    config: Mapping[str, Any], key: str, file: str | PathLike[str] | None, expected: str, meets: Any
) -> None:
    if key not in config:
        raise _error(file, key, "missing", expected)
    if not meets(config[key]):
        raise _error(file, key, f"is {config[key]!r}", expected)


_FLAGS: Mapping[str, str] = {"r": "lora_r", "target_modules": "lora_target_modules"}


def _error(
    file: str | PathLike[str] | None, key: str, what: str, expected: str, fix: str | None = None
) -> AlpacaLoraError:
    if file is None:
        return ConfigError(what, field=_FLAGS.get(key, key), expected=expected, fix=fix)
    return AdapterError(what, file=file, field=key, expected=expected, fix=fix)
