"""What the methods that put something beside linears share: the module that takes a linear's place, and the adapter
that puts such modules on a model, takes them off and folds them in.

Knows linears by their contract; knows no formula of any method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.adapters.whole_modules import PEFT_PREFIX, WholeModules, carried_wholly
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError, NumericalError
from alpaca_lora.models.decoder import CausalLM


class AdaptedLinear(nn.Module):
    """A linear with something beside it. Keeps `models.linear.LinearContract`.

    base: any linear, frozen. A subclass says what is added (`project_together`), under which names PEFT keeps its
    tensors (`suffixes`: PEFT's end of the key -> attribute) and what base and addition come to (`merged`).
    """

    suffixes: ClassVar[Mapping[str, str]]

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = features(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_together(x, (self,))[0]

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), adapted or not."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """PEFT's end of the key -> parameter."""
        return {suffix: getattr(self, attribute) for suffix, attribute in self.suffixes.items()}

    def merged_weight(self) -> torch.Tensor:
        """The weight (out, in) that gives the same outputs alone; float32, outside of autograd."""
        raise NotImplementedError

    def merged(self) -> dict[str, torch.Tensor]:
        """The base's parameters that the method changes -> their merged values in float32."""
        return {"weight": self.merged_weight()}

    def dense_weight(self) -> torch.Tensor:
        """`merged_weight` in the base's compute dtype."""
        return self.merged_weight().to(base_weight(self.base).dtype)

    @property
    def weight(self) -> torch.Tensor:
        """`dense_weight`, for modules that read a linear's weight where they could call it (torch's encoder layer does
        while it does not train). Learning through it would pass the adapter by: the backward pass is an AdapterError.
        """
        weight = self.dense_weight().detach()
        if torch.is_grad_enabled():
            weight.requires_grad_().register_hook(_refuse_gradient)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias that goes with `weight`."""
        bias = getattr(self.base, "bias", None)
        merged = self.merged().get("bias") if bias is not None else None
        return bias if merged is None else merged.to(bias.dtype)  # pyright: ignore[reportOptionalMemberAccess]

    def change(self) -> float:
        """How far this is from the base: for methods that add to the weight the Frobenius norm of W' - W, scale and
        all. 0 where the method did not act.
        """
        raise NotImplementedError

    def weights_changed(self) -> None:
        """Drop what was computed from the weights and kept."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.weights_changed()  # moved to another device or dtype
        return super()._apply(fn, recurse)


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise AdapterError(
        "the weight of an adapted linear was read where the linear should be called: its adapter would learn nothing",
        fix="leave this linear out of the targets, or call it",
    )


Make = Callable[[str, nn.Module], AdaptedLinear]  # (module name, its linear) -> what takes its place


class LinearAdapter(Adapter):
    """An adapter that is a set of `AdaptedLinear`s, by module name."""

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], config: dict[str, Any], messages: list[str],
        whole: WholeModules | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, messages, whole)
        self.layers = layers

    @classmethod
    def _put_on(
        cls, model: nn.Module, names: Iterable[str], make: Make, config: dict[str, Any], messages: list[str], *,
        trainable: bool, saved: Sequence[str], whole: Callable[[], WholeModules | None], file: Any = None, **more: Any,
    ) -> Self:  # fmt: skip
        """Replace the linears called ``names`` by what ``make`` gives and freeze all else; nothing is changed before
        everything is made. ``whole`` is called once the model is frozen and gives the modules ``saved`` (full names),
        or nothing when there are none. ``file``: where the adapter is read from. ``more`` goes to the class.
        """
        names = list(names)
        refuse_both(names, saved, file)
        check_free(model, names, saved)
        if trainable and "lm_head" in names and hasattr(model, "head_weight"):
            # the loss reads the head's weight and knows nothing of what is beside it
            raise ConfigError(
                f"the head cannot be adapted by method {cls.method}", field="lora_target_modules",
                expected="other linears", fix="name it in modules_to_save to train it wholly",
            )  # fmt: skip
        layers: dict[str, AdaptedLinear] = {}
        for name in names:
            base = model.get_submodule(name)
            layers[name] = make(name, base).requires_grad_(trainable)
        model.requires_grad_(False)
        for name, layer in layers.items():
            layer.base.requires_grad_(False)
            replace(model, name, layer)
        return cls(model, layers, config, messages, whole() if saved else None, **more)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            for suffix, parameter in layer.tensors().items():
                yield f"{PEFT_PREFIX}{name}.{suffix}", parameter

    def parts(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        for name, layer in self.layers.items():
            for suffix, parameter in layer.tensors().items():
                yield name, suffix.removesuffix(".weight"), parameter

    def set_rows(self, row_keys_T: torch.Tensor | None) -> None:
        for layer in self.layers.values():
            layer.weights_changed()

    def _moved(self) -> dict[str, float]:
        return {name: layer.change() for name, layer in self.layers.items()}

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Adapter.merged_tensors`. NumericalError when one is not finite."""
        self._check_attached()
        for name, layer in self.layers.items():
            for leaf, value in layer.merged().items():
                yield f"{name}.{leaf}", finite(value, name)
        if self.whole is not None:
            yield from self.whole.merged_tensors()

    def merge(self) -> None:
        """Fold the update into the base's weights (computed in float32, stored in their dtype) and take the adapter
        off; whole modules stay as they were trained.

        All or nothing: every weight is checked before the first is changed. AdapterError when the adapter is not on the
        model, when a base cannot be written to, or when its weight is shared with another module; NumericalError when a
        result is not finite.
        """
        self._check_attached()
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in self.layers.items():
            for leaf, value in layer.merged().items():
                parameter = getattr(layer.base, leaf, None)
                if not isinstance(parameter, nn.Parameter):
                    raise AdapterError(
                        f"holds no dense {leaf} to merge into",
                        field=name,
                        fix="use the merge command, which writes a new folder",
                    )
                if len(owners[id(parameter)]) > 1:
                    raise AdapterError(
                        f"its {leaf} is shared ({', '.join(owners[id(parameter)])}): merging would change both",
                        field=name,
                    )
                finite(value.to(parameter.dtype), name)
        with torch.no_grad():
            for layer in self.layers.values():
                for leaf, value in layer.merged().items():
                    getattr(layer.base, leaf).copy_(value)
        self._take_off()
        if self.whole is not None:
            self.whole.keep()

    def remove(self) -> None:
        """Take the adapter off; the base is what it was, bit for bit. AdapterError when it is off already."""
        self._check_attached()
        self._take_off()
        if self.whole is not None:
            self.whole.restore()

    def _take_off(self) -> None:
        for name, layer in self.layers.items():
            replace(self.model, name, layer.base)
        self.layers = {}

    def _check_attached(self) -> None:
        if not self.layers:
            raise AdapterError("the adapter is not on the model any more: it was merged or removed")


def base_weight(linear: nn.Module) -> torch.Tensor:
    """The dense weight (out, in) of a linear that keeps the contract, or of torch's."""
    dense = getattr(linear, "dense_weight", None)
    return linear.weight if dense is None else dense()  # pyright: ignore[reportReturnType]


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear."""
    return int(linear.in_features), int(linear.out_features)  # pyright: ignore[reportArgumentType]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors lie."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def seeded(seed: int, purpose: str, name: str) -> torch.Generator:
    """A generator that is a pure function of its arguments: adding a target does not change what the others start
    from.
    """
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weight itself; NumericalError when it is not finite."""
    if not torch.isfinite(weight).all():
        raise NumericalError(
            "the merged weight holds NaN or Inf", field=name, fix="nothing was changed; use an earlier checkpoint"
        )
    return weight


def check_free(model: nn.Module, linears: Sequence[str] | None = None, saved: Sequence[str] = ()) -> None:
    """AdapterError naming what is on the model when a new adapter would not leave it as it is.

    Beside linears that have an adapter, others may get one: ``linears``, and the modules ``saved`` to be trained wholly
    with them. Every other method (None) wants a model that carries nothing.
    """
    if any(isinstance(module, CausalLM) and module.prefix is not None for module in model.modules()):
        raise AdapterError("the model has virtual tokens already", fix="remove that adapter first")
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    wanted = [*(linears or ()), *saved]
    for name in adapted:
        if linears is None or any(_one_is_inside(name, other) for other in wanted):
            raise AdapterError("already carries an adapter", field=name, fix="merge or remove that one first")
    for name in carried_wholly(model):
        # without adapted linears beside it, it is an adapter of its own (freeze, bitfit, full)
        if linears is None or not adapted or any(_one_is_inside(name, other) for other in wanted):
            raise AdapterError(
                "is already trained wholly, by another adapter", field=name or "the model itself",
                fix="merge or remove that one first",
            )  # fmt: skip


def refuse_both(targets: Sequence[str], saved: Sequence[str], file: Any = None) -> None:
    """An error for a module that is to be trained wholly and to carry an adapter, itself or inside of it: of the user's
    options, or of a ``file``.
    """
    for name in saved:
        if inside := [target for target in targets if target == name or target.startswith(f"{name}.")]:
            what, fix = f"{name} is to be trained wholly and {inside[0]} of it by an adapter", "keep one of both"
            error: AlpacaLoraError = ConfigError(what, field="modules_to_save", fix=fix)
            raise error if file is None else AdapterError(what, file=file, field="modules_to_save", fix=fix)


def _one_is_inside(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
