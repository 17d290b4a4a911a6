"""What an adapter_config.json of type ADALORA says, and how long the phases of a run are.

Knows PEFT's `AdaLoraConfig` (version 0.21), which is its `LoraConfig` with more keys. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from alpaca_lora.adapters import lora_config
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError

# PEFT's own defaults: what a file that leaves a key out means.
DEFAULTS: Mapping[str, Any] = {
    "target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
    "orth_reg_weight": 0.5, "total_step": None, "rank_pattern": None,
}  # fmt: skip
_FLAGS: Mapping[str, str] = {
    "target_r": "lora_r", "init_r": "adalora_init_r", "tinit": "adalora_tinit", "tfinal": "adalora_tfinal",
    "deltaT": "adalora_delta_t", "beta1": "adalora_beta1", "beta2": "adalora_beta2",
    "orth_reg_weight": "adalora_orth_weight",
}  # fmt: skip
UNUSED_R = 8  # LoraConfig's `r`, which AdaLoRA does not read; PEFT warns of any other value


def check_config(config: Mapping[str, Any], *, file: str | PathLike[str] | None = None) -> list[str]:
    """As `lora_config.check_config`, for type ADALORA."""
    whole = {**DEFAULTS, **config}
    for key, expected, meets in (
        ("init_r", "a whole number of at least 1", lambda v: _is_count(v, 1)),
        ("target_r", "a whole number of at least 1", lambda v: _is_count(v, 1)),
        ("tinit", "a whole number of at least 0", lambda v: _is_count(v, 0)),
        ("tfinal", "a whole number of at least 0", lambda v: _is_count(v, 0)),
        ("deltaT", "a whole number of at least 1", lambda v: _is_count(v, 1)),
        ("beta1", "between 0 and 1", lambda v: isinstance(v, float) and 0 < v < 1),
        ("beta2", "between 0 and 1", lambda v: isinstance(v, float) and 0 < v < 1),
        ("orth_reg_weight", "a number of at least 0", lambda v: isinstance(v, int | float) and 0 <= v <= 1e6),
        ("rank_pattern", f"lists of {whole['init_r']} true or false", lambda v: _is_pattern(v, whole["init_r"])),
    ):
        if not meets(whole[key]):
            raise _error(file, key, f"is {str(whole[key])[:200]}", expected)
    if file is None and whole["init_r"] <= whole["target_r"]:
        raise _error(
            file, "init_r", f"{whole['init_r']} leaves nothing to prune", f"more than lora_r, {whole['target_r']}"
        )
    rest = {key: value for key, value in config.items() if key not in DEFAULTS}
    messages = lora_config.check_config({**rest, "r": UNUSED_R}, file=file)
    if config.get("alpha_pattern"):
        messages.append(f"{file}: alpha_pattern: not used by AdaLoRA, as in PEFT")
    return messages


def settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Setting]:
    """Rank of each module, init_r or what the file's rank_pattern left of it, and the factor alpha / (init_r + 1e-5).

    The factor never follows the rank: pruning takes a triplet away and leaves the others as they are. AdapterError when
    the pattern names a module that has no adapter.
    """
    initial = {**DEFAULTS, **config}["init_r"]
    scale = config["lora_alpha"] / (initial + 1e-5)
    masks = masks_of(config)
    found = {name: Setting(sum(masks[name]) if name in masks else initial, scale) for name in names}
    if others := sorted(masks.keys() - found.keys()):
        raise AdapterError(f"{others[0]} is no target of this adapter and model", field="rank_pattern")
    return found


def masks_of(config: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Module -> which of its initial triplets were kept, from PEFT's rank_pattern; empty while nothing was removed."""
    suffix = ".lora_E"
    return {key.removesuffix(suffix): mask for key, mask in (config.get("rank_pattern") or {}).items()}


def pattern_of(masks: Mapping[str, list[bool]]) -> dict[str, list[bool]]:
    """The rank_pattern that `masks_of` reads."""
    return {f"{name}.lora_E": mask for name, mask in masks.items()}


def phases(tinit: float, tfinal: float, delta_t: int, total_steps: int) -> tuple[int, int]:
    """(steps before ranks begin to fall, steps after they are final) of a run; both given as a count, or below 1 as a
    share of all steps.

    ConfigError naming the option when no step is left to prune in, or too few for the first pruning to fall due.
    """
    warmup, tail = (
        _steps(value, total_steps, field) for value, field in ((tinit, "adalora_tinit"), (tfinal, "adalora_tfinal"))
    )
    pruning = total_steps - warmup - tail
    if pruning < 1:
        raise ConfigError(
            f"{warmup} steps before pruning and {tail} after it leave none of this run's {total_steps} to prune in",
            field="adalora_tinit" if warmup >= tail else "adalora_tfinal",
            expected=f"adalora_tinit + adalora_tfinal below {total_steps}", fix="lower one of them, or train longer",
        )  # fmt: skip
    if delta_t > pruning:
        raise ConfigError(
            f"ranks are to change every {delta_t} steps, the phase in which they do has {pruning}",
            field="adalora_delta_t", expected=f"at most {pruning}", fix="lower it, or train longer",
        )  # fmt: skip
    return warmup, tail


def _steps(value: float, total_steps: int, field: str) -> int:
    if value < 1:
        return round(value * total_steps)
    if not float(value).is_integer():
        raise ConfigError(f"is {value}", field=field, expected="a whole number of steps, or a share below 1")
    return int(value)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_pattern(value: Any, length: int) -> bool:
    if value is None:
        return True

    def is_entry(key: Any, mask: Any) -> bool:
        named = isinstance(key, str) and key.endswith(".lora_E")
        return named and isinstance(mask, list) and len(mask) == length and all(type(bit) is bool for bit in mask)

    return isinstance(value, dict) and all(is_entry(key, mask) for key, mask in value.items())


def _error(file: str | PathLike[str] | None, key: str, what: str, expected: str) -> AlpacaLoraError:
    if file is None:
        return ConfigError(what, field=_FLAGS.get(key, key), expected=expected)
    return AdapterError(what, file=file, field=key, expected=expected)
