"""What has to be known of a `torch.nn.Module` that somebody else wrote before an adapter can sit on it: which linears
can carry one, how to name them so that PEFT finds the same, and how to tell the model from another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from alpaca_lora.adapters.targets import ALL_LINEAR, find_targets, linear_names
from alpaca_lora.errors import ConfigError


def target_entries(model: nn.Module, targets: Sequence[str], wholly: Sequence[str]) -> tuple[list[str], list[str]]:
    """(entries that mean exactly these targets, to PEFT too; what the user should be told).

    `all-linear` among the targets is every linear, heads included, but for those of the modules that are to be trained
    ``wholly`` (full names) and those that an adapter would not reach. ConfigError for a target that cannot carry
    one.
    """
    if isinstance(model, nn.Linear):
        raise ConfigError(
            "the model is a linear itself", field="model", fix="put it into a module: nn.Sequential(model)"
        )
    if ALL_LINEAR not in targets:
        _check_usable(model, find_targets(model, targets))
        return list(targets), []
    names = [name for name in linear_names(model) if not _inside(name, wholly)]
    messages: list[str] = []
    if bypassed := [name for name in names if _is_bypassed(model, name)]:
        messages.append(f"left out, since torch's attention never calls them: {', '.join(bypassed)}")
    if head := [name for name in names if name == "lm_head" and hasattr(model, "head_weight")]:
        messages.append("left out: lm_head, whose weight the loss reads")
    names = [name for name in names if name not in {*bypassed, *head}]
    if not names:
        raise ConfigError("the model holds no nn.Linear", field="targets")
    _check_usable(model, names)
    # a name may also be the end of another module's, which PEFT would take for a target
    others = [name for name, _ in model.named_modules() if name not in set(names)]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return [f"({'|'.join(map(re.escape, names))})"], messages
    return names, messages


def fingerprint_of(model: nn.Module, wholly: Sequence[str] = ()) -> str:
    """sha256 over names, shapes and values of a model's parameters, but for those of the modules that are trained
    ``wholly`` (full names). Buffers are left out: running averages change while nothing is trained.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if _inside(name.rpartition(".")[0], wholly):
            continue
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
        if values.numel():
            digest.update(values.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def warnings_of(model: nn.Module) -> list[str]:
    """What of the model changes in training although it is frozen."""
    running = [name for name, module in model.named_modules() if _keeps_averages(module)]
    if not running:
        return []
    return [
        f"{', '.join(running[:3])}{' and others' if len(running) > 3 else ''}: running averages change in train() mode "
        "and are not saved with the adapter; keep these modules in eval() mode"
    ]


def _keeps_averages(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def _inside(name: str, modules: Sequence[str]) -> bool:
    """True for one of the modules and for what is in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_bypassed(model: nn.Module, name: str) -> bool:
    """torch's attention hands its output projection's weight to a kernel: what is beside it would not act."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _check_usable(model: nn.Module, names: Sequence[str]) -> None:
    """ConfigError for a target on which an adapter would do nothing, or half of what it should."""
    homes: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        homes.setdefault(id(module), []).append(name)
    for name in names:
        module = model.get_submodule(name)
        if _is_bypassed(model, name):
            raise ConfigError(f"{name}: torch's attention reads its weight and never calls it", field="targets")
        if len(homes[id(module)]) > 1:
            raise ConfigError(
                f"{' and '.join(homes[id(module)])} are one linear: an adapter would sit on one of the names only",
                field="targets", fix="name the other linears",
            )  # fmt: skip
        if any(is_lazy(parameter) for parameter in module.parameters()):
            raise ConfigError(
                f"{name} has no shape yet", field="targets", fix="run the model once before it is adapted"
            )
