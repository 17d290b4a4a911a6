"""LoRA: y = x W^T + b + s drop(x) A^T B^T with W frozen (Hu et al. 2021, equation 3), s = alpha / r or alpha / sqrt(r).

Knows linears by their contract and PEFT's names; knows neither what is inside of a linear nor where files lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alpaca_lora.adapters.lora_config import DEFAULTS, Setting, check_config, settings
from alpaca_lora.adapters.targets import find_targets, peft_spec, peft_targets
from alpaca_lora.device import available_memory_bytes
from alpaca_lora.errors import AdapterError, ConfigError, MachineError, NumericalError
from alpaca_lora.kernels.dropout import DropoutKey
from alpaca_lora.kernels.lora import lora_add
from alpaca_lora.models.linear import project

PEFT_PREFIX = "base_model.model."


@dataclass(slots=True)
class DropoutRows:
    """Shared by all linears of one adapter: whose rows are in the stream. keys_T int32; None means no dropout."""

    p: float
    keys_T: torch.Tensor | None = None


class LoRALinear(nn.Module):
    """A linear with a low-rank update beside it. Keeps `models.linear.LinearContract`.

    base: any linear, frozen. lora_A (R, in), lora_B (out, R): float32 whatever the base is stored in.
    """

    def __init__(
        self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float, rows: DropoutRows, salt: int
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = lora_A.shape[1], lora_B.shape[0]
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scale, self.rows, self.salt = scale, rows, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_together(x, (self,))[0]

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), adapted or not: one dropout mask, one product x A^T."""
        x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        outputs = project(x_TD, [one.base if isinstance(one, LoRALinear) else one for one in linears])
        adapted = [one for one in linears if isinstance(one, LoRALinear)]
        # one pass for each adapter that is in the group: two adapters may drop differently
        for rows in {id(one.rows): one.rows for one in adapted}.values():
            group = [one if isinstance(one, LoRALinear) and one.rows is rows else None for one in linears]
            first = next(one for one in group if one is not None)
            outputs = lora_add(
                outputs, x_TD,
                [None if one is None else one.lora_A for one in group],
                [None if one is None else one.lora_B for one in group],
                [0.0 if one is None else one.scale for one in group],
                first.dropout_key(x_TD),
            )  # fmt: skip
        return tuple(outputs) if x.ndim == 2 else tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)

    def dropout_key(self, x_TD: torch.Tensor) -> DropoutKey | None:
        """How to draw the mask of the input x; None outside of training."""
        keys_T = self.rows.keys_T
        if keys_T is None or self.rows.p == 0:
            return None
        if keys_T.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"dropout has keys for {keys_T.shape[0]} rows, the input has {x_TD.shape[0]}: call set_rows"
            )
        return DropoutKey(keys_T, self.rows.p, self.salt)

    def dense_weight(self) -> torch.Tensor:
        """W + s B A (out, in), summed in float32, in the base's compute dtype."""
        return self.merged_weight().to(base_weight(self.base).dtype)

    def merged_weight(self) -> torch.Tensor:
        """W + s B A (out, in) in float32, outside of autograd."""
        with torch.no_grad():
            return torch.addmm(base_weight(self.base).float(), self.lora_B, self.lora_A, alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.rows.p:g}"


def base_weight(linear: nn.Module) -> torch.Tensor:
    """The dense weight (out, in) of a linear that keeps the contract, or of torch's."""
    dense = getattr(linear, "dense_weight", None)
    return linear.weight if dense is None else dense()  # pyright: ignore[reportReturnType]


def initial_A(seed: int, name: str, rank: int, in_features: int) -> torch.Tensor:
    """(R, in) float32 for module `name`: kaiming_uniform with a = sqrt(5), that is U(-b, b) with b = 1 / sqrt(in).

    A pure function of its arguments: adding a target does not change what the others start from.
    """
    digest = hashlib.sha256(f"lora_A\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


class Lora:
    """The adapter: all `LoRALinear`s of one model, by module name. See `adapters.base.Adapter`."""

    method = "lora"
    peft_type = "LORA"

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, LoRALinear],
        config: dict[str, Any],
        rows: DropoutRows,
        messages: list[str],
    ) -> None:
        self.model, self.layers, self.config, self.rows = model, layers, config, rows
        self.messages = messages  # what the user should be told

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int) -> Lora:
        """Put a new adapter on `model` in place, as `adapters.options.AdapterOptions` say; freezes everything else.

        Raises ConfigError: impossible rank, alpha or dropout; a target that does not exist. AdapterError: a target has
        an adapter already.
        """
        targets = find_targets(model, options.lora_target_modules)
        entries = options.lora_target_modules
        alpha = options.lora_alpha
        config = {
            **DEFAULTS,
            "r": options.lora_r,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": options.lora_dropout,
            "use_rslora": options.use_rslora,
            "target_modules": peft_spec(model, [entries] if isinstance(entries, str) else entries, targets),
            "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        }
        messages = check_config(config)
        return cls._put_on(model, config, settings(config, targets), messages, seed=seed)

    @classmethod
    def expected_shapes(cls, model: nn.Module, config: Mapping[str, Any], *, file: Any) -> dict[str, tuple[int, ...]]:
        """PEFT key -> shape of all that a file with this adapter_config must hold for `model`, which stays untouched.

        Raises AdapterError when the configuration cannot be right, is not supported, or names nothing in this model.
        """
        check_config(config, file=file)
        names, problems = peft_targets(model, config)
        if not names:
            raise AdapterError(
                "; ".join(problems) or "names no linear of this model",
                file=file,
                field="target_modules",
                fix="is this the right base model?",
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, setting in settings(config, names).items():
            in_features, out_features = _features(model.get_submodule(name))
            shapes[peft_key(name, "A")] = (setting.rank, in_features)
            shapes[peft_key(name, "B")] = (out_features, setting.rank)
        return shapes

    @classmethod
    def from_peft(
        cls,
        model: nn.Module,
        config: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        trainable: bool,
        file: Any,
    ) -> Lora:
        """Put a saved adapter on `model`; `tensors` are those of `expected_shapes`."""
        messages = check_config(config, file=file)
        names, problems = peft_targets(model, config)
        messages += [f"{file}: target_modules: {problem}" for problem in problems]
        if not any(bool(tensors[peft_key(name, "B")].any()) for name in names):
            messages.append(f"{file}: the adapter changes nothing: every lora_B is zero")
        return cls._put_on(model, dict(config), settings(config, names), messages, tensors, trainable=trainable)

    @classmethod
    def _put_on(
        cls, model: nn.Module, config: dict[str, Any], chosen: Mapping[str, Setting], messages: list[str],
        tensors: Mapping[str, torch.Tensor] | None = None, *, seed: int = 0, trainable: bool = True,
    ) -> Lora:  # fmt: skip
        _check_free(model, chosen)
        if trainable and "lm_head" in chosen and hasattr(model, "head_weight"):
            # the loss reads the head's weight and makes no gradient for it
            raise ConfigError(
                "the head cannot be trained yet by method lora", field="lora_target_modules", expected="other linears"
            )
        if tensors is None:
            _check_memory(model, chosen)
        model.requires_grad_(False)
        rows = DropoutRows(float(config.get("lora_dropout") or 0.0))
        layers: dict[str, LoRALinear] = {}
        for name, setting in chosen.items():
            base = model.get_submodule(name)
            in_features, out_features = _features(base)
            widest = min(in_features, out_features)
            if setting.rank > widest:
                messages.append(f"{name}: rank {setting.rank} is larger than the weight can have, {widest}")
            if tensors is None:
                a, b = initial_A(seed, name, setting.rank, in_features), torch.zeros(out_features, setting.rank)
            else:
                a, b = tensors[peft_key(name, "A")], tensors[peft_key(name, "B")]
            device = _device(base)
            a, b = (matrix.to(device, torch.float32, copy=True) for matrix in (a, b))
            layers[name] = LoRALinear(base, a, b, setting.scale, rows, _salt(name)).requires_grad_(trainable)
            base.requires_grad_(False)
        for name, layer in layers.items():
            _replace(model, name, layer)
        return cls(model, layers, config, rows, messages)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(PEFT key, parameter) in the model's order; none of an adapter that was loaded to be used only."""
        return ((key, parameter) for key, parameter in self._parameters() if parameter.requires_grad)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield peft_key(name, "A"), layer.lora_A
            yield peft_key(name, "B"), layer.lora_B

    def set_rows(self, row_keys_T: torch.Tensor | None) -> None:
        """Key the dropout of the next forward (and of its backward) by row; None: no dropout."""
        self.rows.keys_T = row_keys_T

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """PEFT key -> float32 tensor on the CPU, a copy."""
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in self._parameters()}

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_tensors` gave. AdapterError when keys or shapes are not those of this adapter."""
        own = dict(self._parameters())
        if own.keys() != tensors.keys():
            raise AdapterError(
                f"other tensors than this adapter's, for example {sorted(own.keys() ^ tensors.keys())[0]}"
            )
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                raise AdapterError(
                    f"shape {tuple(tensors[key].shape)}", field=key, expected=f"{tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(tensors[key])

    def moved(self) -> dict[str, float]:
        """Norm of each module's lora_B, which starts at zero."""
        return {name: float(layer.lora_B.detach().norm()) for name, layer in self.layers.items()}

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of the base's weight, W + s B A in float32) one at a time. NumericalError when one is not finite."""
        self._check_attached()
        for name, layer in self.layers.items():
            yield f"{name}.weight", _finite(layer.merged_weight(), name)

    def merge(self) -> None:
        """Fold the update into the base's weights (summed in float32, stored in their dtype) and take the adapter off.

        All or nothing: every weight is checked before the first is changed. AdapterError when the adapter is not on the
        model, when a base cannot be written to, or when its weight is shared with another module; NumericalError when a
        result is not finite.
        """
        self._check_attached()
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in self.layers.items():
            weight = getattr(layer.base, "weight", None)
            if not isinstance(weight, nn.Parameter):
                raise AdapterError(
                    "holds no dense weight to merge into",
                    field=name,
                    fix="use the merge command, which writes a new folder",
                )
            if len(owners[id(weight)]) > 1:
                raise AdapterError(
                    f"its weight is shared ({', '.join(owners[id(weight)])}): merging would change both", field=name
                )
            _finite(layer.merged_weight().to(weight.dtype), name)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.base.weight.copy_(layer.merged_weight())  # pyright: ignore[reportCallIssue]
        self.remove()

    def remove(self) -> None:
        """Take the adapter off; the base is what it was, bit for bit. AdapterError when it is off already."""
        self._check_attached()
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        self.layers = {}

    def _check_attached(self) -> None:
        if not self.layers:
            raise AdapterError("the adapter is not on the model any more: it was merged or removed")


def peft_key(name: str, matrix: str) -> str:
    """PEFT's name of lora_A ("A") or lora_B ("B") of module `name`."""
    return f"{PEFT_PREFIX}{name}.lora_{matrix}.weight"


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"dropout\0{name}".encode()).digest()[:4], "little") >> 1


def _features(linear: nn.Module) -> tuple[int, int]:
    return int(linear.in_features), int(linear.out_features)  # pyright: ignore[reportArgumentType]


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(weight).all():
        raise NumericalError(
            "the merged weight holds NaN or Inf", field=name, fix="nothing was changed; use an earlier checkpoint"
        )
    return weight


def _check_free(model: nn.Module, names: Iterable[str]) -> None:
    """AdapterError when a target, or a module around it, carries an adapter."""
    taken = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        if any(name == other or name.startswith(other + ".") for other in taken):
            raise AdapterError("already carries an adapter", field=name, fix="merge or remove that one first")


def _check_memory(model: nn.Module, chosen: Mapping[str, Setting]) -> None:
    """MachineError before matrices are made that this machine cannot hold."""
    sizes = (setting.rank * sum(_features(model.get_submodule(name))) for name, setting in chosen.items())
    needed, available = 4 * sum(sizes), available_memory_bytes()  # they are made on the CPU
    if needed > available:
        raise MachineError(
            f"the adapter's matrices need {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free", field="lora_r",
            fix="choose a lower rank or fewer targets",
        )  # fmt: skip


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
