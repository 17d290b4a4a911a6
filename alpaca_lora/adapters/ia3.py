"""IA3: learned factors on activations (Liu et al. 2022, section 3.3).

    keys and values:   l * (x W^T + b)        where the feed-forward's inner activations are read:   (l * x) W^T + b

Knows linears by their contract and PEFT's `IA3Config`; knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import EncodeText
from alpaca_lora.adapters.linear_adapter import (
    PEFT_PREFIX,
    AdaptedLinear,
    LinearAdapter,
    base_weight,
    device_of,
    features,
    refuse_both,
)
from alpaca_lora.adapters.lora import chosen_targets
from alpaca_lora.adapters.lora_config import check_sizes
from alpaca_lora.adapters.targets import MAX_HINTS, find_modules, peft_spec, peft_targets, task_type
from alpaca_lora.adapters.whole_modules import WholeModules, matching
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.kernels.scale import scale_columns
from alpaca_lora.models.linear import project
from alpaca_lora.models.name_pattern import Effort, NamePattern

DEFAULTS: Mapping[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "fan_in_fan_out": False, "feedforward_modules": None,
    "inference_mode": True, "init_ia3_weights": True, "modules_to_save": None, "peft_type": "IA3", "revision": None,
    "target_modules": None, "task_type": None,
}  # fmt: skip
IGNORED = (
    "exclude_modules",
    "ensure_weight_tying",
    "peft_version",
)  # known besides; the first is read by `peft_targets`
VECTOR = "ia3_l"


class IA3Linear(AdaptedLinear):
    """ia3_l (out, 1) scales the output, bias and all; (1, in), of a feed-forward module, the input. float32."""

    suffixes: ClassVar[Mapping[str, str]] = {VECTOR: VECTOR}

    def __init__(self, base: nn.Module, ia3_l: torch.Tensor, feedforward: bool) -> None:
        super().__init__(base)
        self.ia3_l, self.feedforward = nn.Parameter(ia3_l), feedforward

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), adapted or not; scaled inputs go their own way."""
        x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        shared = [one for one in linears if not (isinstance(one, IA3Linear) and one.feedforward)]
        found = iter(project(x_TD, [one.base if isinstance(one, IA3Linear) else one for one in shared]))
        outputs: list[torch.Tensor] = []
        for one in linears:
            if not isinstance(one, IA3Linear):
                outputs.append(next(found))
            elif one.feedforward:
                outputs.append(one.base(scale_columns(x_TD, one.ia3_l.flatten(), None, None)))
            else:
                outputs.append(scale_columns(next(found), one.ia3_l.flatten(), None, None))
        return tuple(outputs) if x.ndim == 2 else tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """l * W, by rows or by columns, in float32."""
        return base_weight(self.base).float() * self.ia3_l

    def merged(self) -> dict[str, torch.Tensor]:
        """The scaled weight, and the bias where the output is scaled."""
        bias = getattr(self.base, "bias", None)
        if self.feedforward or bias is None:
            return {"weight": self.merged_weight()}
        return {"weight": self.merged_weight(), "bias": bias.detach().float() * self.ia3_l.detach().flatten()}

    def change(self) -> float:
        """Norm of l - 1."""
        return float((self.ia3_l.detach() - 1).norm())

    def extra_repr(self) -> str:
        return "on the input" if self.feedforward else "on the output"


class IA3(LinearAdapter):
    """The adapter: all `IA3Linear`s of one model, by module name. See `adapters.base.Adapter`."""

    method = "ia3"
    peft_type = "IA3"

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """Put a new adapter on `model` in place, as `adapters.options.AdapterOptions` say; freezes everything else.

        Raises ConfigError: a target that does not exist, a feed-forward module that is no target. AdapterError: a
        target has an adapter already.
        """
        targets = chosen_targets(model, options)
        inside = feedforward_names(targets, options.ia3_feedforward_modules)
        for entry in options.ia3_feedforward_modules:
            if not feedforward_names(targets, [entry]):
                ends = dict.fromkeys(name.rpartition(".")[2] for name in targets)
                raise ConfigError(
                    f"{entry!r} is none of the targets", field="ia3_feedforward_modules",
                    expected=f"some of {', '.join(ends)}", fix="name it in lora_target_modules too",
                )  # fmt: skip
        spec, feedforward = _peft_specs(model, options, targets, inside)
        saved = find_modules(model, options.modules_to_save)
        config = {
            **DEFAULTS, "target_modules": spec, "feedforward_modules": feedforward,
            "task_type": task_type(model),
        }  # fmt: skip

        def make(name: str, base: nn.Module) -> AdaptedLinear:
            return IA3Linear(base, torch.ones(_shape(base, name in inside), device=device_of(base)), name in inside)

        adapter = cls._put_on(
            model, targets, make, config, [], trainable=True, saved=saved,
            whole=lambda: WholeModules.train(model, saved),
        )  # fmt: skip
        if adapter.whole is not None:
            config.update(adapter.whole.config_keys(tying=False))
        return adapter

    @classmethod
    def expected_shapes(cls, model: nn.Module, config: Mapping[str, Any], *, file: Any) -> dict[str, tuple[int, ...]]:
        """PEFT key -> shape of all that a file with this adapter_config must hold for `model`, which stays untouched.

        Raises AdapterError when the configuration cannot be right, is not supported, or names nothing in this model.
        """
        _check_config(config, file)
        names, problems = _targets(model, config, file)
        if not names:
            raise AdapterError(
                "; ".join(problems[:MAX_HINTS]) or "names no linear of this model", file=file, field="target_modules",
                fix="is this the right base model?",
            )  # fmt: skip
        inside = feedforward_names(names, config.get("feedforward_modules") or ())
        shapes = {f"{PEFT_PREFIX}{name}.{VECTOR}": _shape(model.get_submodule(name), name in inside) for name in names}
        tied, entries = bool(config.get("ensure_weight_tying")), config.get("modules_to_save")
        whole = WholeModules.expected_shapes(model, entries, file=file, tied=tied)
        refuse_both(names, matching(model, entries or ()), file)
        return shapes | whole

    @classmethod
    def from_peft(
        cls, model: nn.Module, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, trainable: bool,
        file: Any,
    ) -> Self:  # fmt: skip
        """Put a saved adapter on `model`; `tensors` are those of `expected_shapes`."""
        messages = _check_config(config, file)
        names, problems = _targets(model, config, file)
        messages += [f"{file}: target_modules: {problem}" for problem in problems[:MAX_HINTS]]
        inside = feedforward_names(names, config.get("feedforward_modules") or ())

        def make(name: str, base: nn.Module) -> AdaptedLinear:
            vector = tensors[f"{PEFT_PREFIX}{name}.{VECTOR}"]
            return IA3Linear(base, vector.to(device_of(base), torch.float32, copy=True), name in inside)

        entries = config.get("modules_to_save") or ()
        adapter = cls._put_on(
            model, names, make, dict(config), messages, trainable=trainable, saved=matching(model, entries),
            whole=lambda: WholeModules.from_tensors(model, tensors, entries, trainable=trainable), file=file,
        )  # fmt: skip
        if not any(adapter.moved().values()):
            messages.append(f"{file}: the adapter changes nothing: every factor is one")
        return adapter

    def facts(self) -> list[tuple[str, str]]:
        """Where the factors ended; they start at one."""
        factors = torch.cat([layer.ia3_l.detach().flatten() for layer in self.layers.values()])
        return [("factors", f"{float(factors.min()):.3g} to {float(factors.max()):.3g}, {len(factors)} of them")]


def _targets(model: nn.Module, config: Mapping[str, Any], file: Any) -> tuple[list[str], list[str]]:
    """As `peft_targets`, of the keys that PEFT's `IA3Config` has."""
    return peft_targets(model, {key: config.get(key) for key in ("target_modules", "exclude_modules")}, file=file)


def feedforward_names(targets: Iterable[str], entries: Sequence[str] | str) -> set[str]:
    """Those of ``targets`` whose input is scaled, by PEFT's rule: a string is an expression of the whole name, a list
    holds ends of names.
    """
    if isinstance(entries, str):
        pattern = NamePattern(entries, Effort(), field="feedforward_modules")
        return {name for name in targets if pattern.matches(name)}
    return {name for name in targets if any(name.endswith(entry) for entry in entries)}


def _shape(base: nn.Module, feedforward: bool) -> tuple[int, int]:
    in_features, out_features = features(base)
    return (1, in_features) if feedforward else (out_features, 1)


def _peft_specs(
    model: nn.Module, options: Any, targets: list[str], inside: set[str]
) -> tuple[list[str] | str, list[str]]:
    """target_modules and feedforward_modules such that PEFT, which wants the second to be a part of the first, finds
    exactly these modules.
    """
    entries = options.lora_target_modules
    entries = targets if options.layers_to_transform else [entries] if isinstance(entries, str) else list(entries)
    spec = peft_spec(model, entries, targets)
    if isinstance(spec, str):
        return spec, sorted(inside)
    chosen = [entry for entry in spec if (hits := feedforward_names(targets, [entry])) and hits <= inside]
    if feedforward_names(targets, chosen) == inside:
        return spec, chosen
    return sorted(targets), sorted(inside)


def _check_config(config: Mapping[str, Any], file: Any) -> list[str]:
    """Refuse what cannot be right or is not built; return what the user should be told."""
    check_sizes(config, file)
    for key, wanted in (("target_modules", True), ("feedforward_modules", False), ("exclude_modules", False)):
        value = config.get(key)
        names = isinstance(value, list) and all(type(entry) is str for entry in value)
        if not (names or isinstance(value, str) or (value is None and not wanted)):
            raise AdapterError(
                f"is {repr(value)[:200]}", file=file, field=key, expected="names or a regular expression"
            )
        if isinstance(value, str):
            NamePattern(value, Effort(file), field=key)
    if config.get("fan_in_fan_out"):
        raise AdapterError(
            "true is not supported: weights here are (out, in)", file=file, field="fan_in_fan_out", expected="false"
        )
    known = {*DEFAULTS, *IGNORED}
    return [f"{file}: {key}: unknown key, kept as it is and not used" for key in sorted(config) if key not in known]
