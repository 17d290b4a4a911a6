"""LoRA: y = x W^T + b + s drop(x) A^T B^T with W frozen (Hu et al. 2021, equation 3), s = alpha / r or alpha / sqrt(r).

Knows linears by their contract and PEFT's names; knows neither what is inside of a linear nor where files lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import EncodeText, Kept
from alpaca_lora.adapters.linear_adapter import (
    PEFT_PREFIX,
    AdaptedLinear,
    LinearAdapter,
    device_of,
    features,
    refuse_both,
)
from alpaca_lora.adapters.lora_config import DEFAULTS, Setting, check_config, end_patterns, settings
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear, initial_A, salt_of
from alpaca_lora.adapters.targets import (
    MAX_HINTS,
    find_modules,
    find_targets,
    in_layers,
    peft_spec,
    peft_targets,
    task_type,
)
from alpaca_lora.adapters.whole_modules import WholeModules, matching
from alpaca_lora.device import available_memory_bytes
from alpaca_lora.errors import AdapterError, ConfigError, MachineError, NumericalError

START = ("start_A", "start_B")  # buffers of a layer


class Lora(LinearAdapter):
    """The adapter: all `LoRALinear`s of one model, by module name. See `adapters.base.Adapter`.

    `dora`, `pissa` and `adalora` are this class with other layers: they say what a layer is made of (`_new_layer`,
    `_saved_layer`, `_shapes`), and what the configuration says of it (`_config`, `_check`, `_settings`).
    """

    method = "lora"
    peft_type = "LORA"
    _check, _settings = staticmethod(check_config), staticmethod(settings)  # of adapter_config.json

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], config: dict[str, Any], messages: list[str],
        whole: WholeModules | None = None, *, rows: DropoutRows, lora_plus_ratio: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, layers, config, messages, whole)
        self.rows, self.lora_plus_ratio = rows, lora_plus_ratio

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """Put a new adapter on `model` in place, as `adapters.options.AdapterOptions` say; freezes everything else.

        Raises ConfigError: impossible rank, alpha or dropout; a target that does not exist. AdapterError: a target has
        an adapter already.
        """
        targets = chosen_targets(model, options)
        config = cls._config(model, options, targets)
        messages = cls._check(config)
        chosen = cls._settings(config, targets)
        check_patterns(config, targets)
        saved = find_modules(model, options.modules_to_save)
        _check_memory(model, chosen)
        rows = DropoutRows(float(options.lora_dropout))

        def make(name: str, base: nn.Module) -> AdaptedLinear:
            setting = chosen[name]
            if setting.rank > (widest := min(features(base))):
                messages.append(f"{name}: rank {setting.rank} is larger than the weight can have, {widest}")
            return cls._new_layer(name, base, setting, rows, seed)

        adapter = cls._put_on(
            model, targets, make, config, messages, trainable=True,
            saved=saved, whole=lambda: WholeModules.train(model, saved),
            rows=rows, lora_plus_ratio=options.lora_plus_ratio,
        )  # fmt: skip
        if adapter.whole is not None:
            config.update(adapter.whole.config_keys())
        return adapter

    @classmethod
    def _config(cls, model: nn.Module, options: Any, targets: list[str]) -> dict[str, Any]:
        alpha = options.lora_alpha
        entries = [options.lora_target_modules] if isinstance(options.lora_target_modules, str) else None
        entries = entries or list(options.lora_target_modules)
        return {
            **DEFAULTS,
            "r": options.lora_r,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": options.lora_dropout,
            "use_rslora": options.use_rslora,
            "target_modules": peft_spec(model, targets if options.layers_to_transform else entries, targets),
            "rank_pattern": read_pattern(options.rank_pattern, "rank_pattern", int),
            "alpha_pattern": read_pattern(options.alpha_pattern, "alpha_pattern", float),
            "task_type": task_type(model),
        }

    @classmethod
    def _new_layer(cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, seed: int) -> AdaptedLinear:
        """A layer that changes nothing yet."""
        in_features, out_features = features(base)
        a = initial_A(seed, name, setting.rank, in_features).to(device_of(base))
        b = torch.zeros(out_features, setting.rank, device=a.device)
        return LoRALinear(base, a, b, setting.scale, rows, salt_of(name))

    @classmethod
    def _saved_layer(
        cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, tensors: Mapping[str, torch.Tensor]
    ) -> AdaptedLinear:
        """The layer that a file describes; ``tensors``: PEFT's end of the key -> float32 copy on the base's device."""
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return LoRALinear(base, a, b, setting.scale, rows, salt_of(name))

    @classmethod
    def _shapes(cls, base: nn.Module, setting: Setting) -> dict[str, tuple[int, ...]]:
        """PEFT's end of the key -> shape of what a file holds of one linear."""
        in_features, out_features = features(base)
        return {"lora_A.weight": (setting.rank, in_features), "lora_B.weight": (out_features, setting.rank)}

    @classmethod
    def expected_shapes(cls, model: nn.Module, config: Mapping[str, Any], *, file: Any) -> dict[str, tuple[int, ...]]:
        """PEFT key -> shape of all that a file with this adapter_config must hold for `model`, which stays untouched.

        Raises AdapterError when the configuration cannot be right, is not supported, or names nothing in this model.
        """
        cls._check(config, file=file)
        names, problems = peft_targets(model, config, file=file)
        if not names:
            raise AdapterError(
                "; ".join(problems[:MAX_HINTS]) or "names no linear of this model",
                file=file,
                field="target_modules",
                fix="is this the right base model?",
            )
        shapes = {
            f"{PEFT_PREFIX}{name}.{suffix}": shape
            for name, setting in cls._settings(config, names).items()
            for suffix, shape in cls._shapes(model.get_submodule(name), setting).items()
        }
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
        messages = cls._check(config, file=file)
        names, problems = peft_targets(model, config, file=file)
        messages += [f"{file}: target_modules: {problem}" for problem in problems[:MAX_HINTS]]
        chosen = cls._settings(config, names)
        rows = DropoutRows(float(config.get("lora_dropout") or 0.0))

        def make(name: str, base: nn.Module) -> AdaptedLinear:
            own = {
                suffix: tensors[f"{PEFT_PREFIX}{name}.{suffix}"].to(device_of(base), torch.float32, copy=True)
                for suffix in cls._shapes(base, chosen[name])
            }
            return cls._saved_layer(name, base, chosen[name], rows, own)

        entries = config.get("modules_to_save") or ()
        adapter = cls._put_on(
            model, names, make, dict(config), messages, trainable=trainable, saved=matching(model, entries),
            whole=lambda: WholeModules.from_tensors(model, tensors, entries, trainable=trainable),
            file=file, rows=rows,
        )  # fmt: skip
        if not any(adapter.moved().values()):
            messages.append(f"{file}: the adapter changes nothing: every lora_B is zero")
        return adapter

    def set_rows(self, row_keys_T: torch.Tensor | None) -> None:
        """Key the dropout of the next forward (and of its backward) by row; None: no dropout."""
        super().set_rows(row_keys_T)
        self.rows.keys_T = row_keys_T
        self.rows.announced |= row_keys_T is not None

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+ (Hayou et al. 2024, section 4): B learns faster than A."""
        return self.lora_plus_ratio if name.endswith(".lora_B.weight") else 1.0

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Where layers began that did not begin at an update of zero."""
        return {
            f"{name}.{which}": tensor.clone()
            for name, layer in self.layers.items()
            for which in START
            if (tensor := getattr(layer, which)) is not None
        }

    def load_extra_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Kept]:
        """As `Adapter.load_extra_state`. AdapterError when it is not the state of this adapter."""
        expected = {
            f"{name}.{which}": parameter.shape
            for name, layer in self.layers.items()
            for which, parameter in zip(START, (layer.lora_A, layer.lora_B), strict=True)
        }
        begun = {key.rpartition(".")[0] for key in tensors}
        wrong = [key for key, tensor in tensors.items() if key not in expected or tensor.shape != expected[key]]
        wrong += [f"{name}.{which}" for name in begun for which in START if f"{name}.{which}" not in tensors]
        if wrong:
            raise AdapterError("not the state of this adapter", field=wrong[0], expected="the run's own checkpoint")
        for name in begun:
            layer = self.layers[name]
            layer.keep_start(*(tensors[f"{name}.{which}"].to(layer.lora_A.device, copy=True) for which in START))
            if self.movement is not None:
                self.movement.begin_at([(name, "lora_A", layer.start_A), (name, "lora_B", layer.start_B)])
        return {}

    def check_acted(self) -> None:
        """As `Adapter.check_acted`; NumericalError, besides, when the scale of a module was another than the one that
        its file says (alpha / r, or rsLoRA's alpha / sqrt(r)).
        """
        super().check_acted()
        for name, setting in self._settings(self.config, self.layers).items():
            if not math.isclose(self.layers[name].scale, setting.scale, rel_tol=1e-6):
                raise NumericalError(
                    f"was trained with a scale of {self.layers[name].scale:g}, its file says {setting.scale:g}",
                    field=name,
                )

    def facts(self) -> list[tuple[str, str]]:
        """Scales, mean effective rank of the updates (see `effective_rank`), and LoRA+'s ratio where there is one."""
        scales = [layer.scale for layer in self.layers.values()]
        rule = "alpha / sqrt(rank), rank-stabilized" if self.config.get("use_rslora") else "alpha / rank"
        lines = [
            ("scale", f"{_range(scales)} = {rule}"),
            ("effective rank", rank_line(list(self.layers.values()))),
        ]
        if begun := sum(layer.start_A is not None for layer in self.layers.values()):
            lines.append(("start", f"what quantizing took from the weights, in {begun} of {len(self.layers)} modules"))
        if self.lora_plus_ratio != 1.0:
            lines.append(("learning rate of lora_B", f"{self.lora_plus_ratio:g} times that of lora_A (LoRA+)"))
        return lines


def rank_line(layers: Sequence[LoRALinear]) -> str:
    """Mean effective rank of the updates beside the ranks that they can have."""
    found = [effective_rank(layer) for layer in layers]
    possible = [possible_rank(layer) for layer in layers]
    return f"{sum(found) / len(found):.1f} of {_range(possible)}, mean over modules"


def possible_rank(layer: LoRALinear) -> int:
    """The largest rank that the update of this layer can have."""
    return min(len(layer.update_factors()[0]), layer.in_features, layer.out_features)


def effective_rank(layer: LoRALinear) -> float:
    """exp of the entropy of the update's normalised singular values (Roy and Vetterli 2007), from R x R products:
    never the dense update. 0 for an update of zero.
    """
    with torch.no_grad():
        a, b = layer.update_factors()
        _, from_b = torch.linalg.qr(b.double())
        _, from_a = torch.linalg.qr(a.double().t())
        values = torch.linalg.svdvals(from_b @ from_a.t())
        if not (total := float(values.sum())):
            return 0.0
        share = values / total
        return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.4g}", f"{max(values):.4g}"
    return least if least == most else f"{least} to {most}"


def chosen_targets(model: nn.Module, options: Any) -> list[str]:
    """Full names of the linears that the options mean, in the model's order."""
    targets = find_targets(model, options.lora_target_modules)
    return in_layers(targets, options.layers_to_transform) if options.layers_to_transform else targets


def read_pattern(entries: Sequence[str], field: str, kind: type[int] | type[float]) -> dict[str, int | float]:
    """``["q_proj=16"]`` -> {"q_proj": 16}. ConfigError for an entry that is none."""
    found: dict[str, int | float] = {}
    for entry in entries:
        pattern, _, value = entry.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = None
        if not pattern or number is None:
            kinds = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{entry!r} is not NAME={kinds}", field=field, fix=f"for example --{field} q_proj=16")
        if pattern in found:
            raise ConfigError(f"{pattern} is given twice: {found[pattern]} and {value}", field=field, fix="keep one")
        found[pattern] = int(number) if float(number).is_integer() else number
    return found


def check_patterns(config: Mapping[str, Any], targets: Iterable[str]) -> None:
    """ConfigError for a pattern that matches the end of no target: it would do nothing, silently."""
    targets = list(targets)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in end_patterns(config, field):
            if not any(map(pattern.matches, targets)):
                ends = dict.fromkeys(name.rpartition(".")[2] for name in targets)
                raise ConfigError(
                    f"{pattern.text!r} matches no target",
                    field=field,
                    expected=f"ends of names such as {', '.join(ends)}",
                )


def _check_memory(model: nn.Module, chosen: Mapping[str, Setting]) -> None:
    """MachineError before matrices are made that this machine cannot hold."""
    sizes = (setting.rank * sum(features(model.get_submodule(name))) for name, setting in chosen.items())
    needed, available = 4 * sum(sizes), available_memory_bytes()  # they are made on the CPU
    if needed > available:
        raise MachineError(
            f"the adapter's matrices need {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free", field="lora_r",
            fix="choose a lower rank or fewer targets",
        )  # fmt: skip
