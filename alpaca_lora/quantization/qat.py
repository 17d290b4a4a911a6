"""Quantization-aware training: the forward pass sees quantized weights, the gradient passes the rounding by.

    y = x Q(W')^T + b     dX = dY Q(W')     dW' = dY^T X      W' = W, or what a base and its adapter merge to (float32)

Bengio et al. 2013 (straight-through estimator); Jacob et al. 2018, section 3, trains so. W' is quantized when it has
changed, that is once per optimizer step, and kept as the parts that a quantized folder holds: evaluation runs through
the very `QuantizedLinear` that `fold` leaves behind, so folding changes no bit of any output.

Knows linears and schemes; of an adapter it knows what `Foldable` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import nn

from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.straight_through import weight_learn
from alpaca_lora.models.linear import Linear, project
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import Scheme

FIELD = "quantization_aware"
OnProgress = Callable[[int, int, str], None]  # done, in all, what


@runtime_checkable
class Foldable(Protocol):
    """A linear with something beside it that merges into its weight and can learn from outputs that hold it already.

    learn_together(x (T, in), outputs, linears): the outputs as they are, with the gradient that each one's own
    parameters have when merged weights make them; see `adapters.lora_linear.LoRALinear`.
    """

    base: Any
    in_features: int
    out_features: int

    def merged_weight(self) -> torch.Tensor: ...

    def learn_together(
        self, x_TD: torch.Tensor, outputs: Sequence[torch.Tensor], linears: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]: ...


class _Kept:
    """The quantized linear that a weight came to, and copies of what the weight was made of then."""

    def __init__(self, sources: Sequence[torch.Tensor], packed: QuantizedLinear) -> None:
        self.sources, self.packed = [source.detach().clone() for source in sources], packed

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        """Compared by value: the optimizer writes through views, which leaves no trace at the parameters."""
        return len(sources) == len(self.sources) and all(map(torch.equal, sources, self.sources))


class FakeQuantized(nn.Module):
    """What both kinds share. A subclass says of which tensors its weight is made, the weight, and who learns."""

    scheme: Scheme
    full_name: str
    _kept: _Kept | None = None

    def _sources(self) -> list[torch.Tensor]:
        """All that the weight is made of and that may change."""
        raise NotImplementedError

    def _quantized(self) -> QuantizedLinear:
        """Made anew of the weight as it is."""
        raise NotImplementedError

    def packed(self) -> QuantizedLinear:
        """The quantized linear that the weights of now come to; made anew only when they have changed."""
        sources = self._sources()
        if self._kept is None or not self._kept.is_of(sources):
            # kept beyond this call, which may be one in inference mode
            with torch.inference_mode(False), torch.no_grad():
                self._kept = None  # not two at a time
                self._kept = _Kept(sources, self._quantized())
        return self._kept.packed

    def dense_weight(self) -> torch.Tensor:
        """Q(W') (out, in) in the compute dtype."""
        return self.packed().dense_weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_together(x, (self,))[0]

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), fake-quantized or not."""
        x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        outputs = project(x_TD, [one.packed() if isinstance(one, FakeQuantized) else one for one in linears])
        if torch.is_grad_enabled():
            outputs = _learn(x_TD, outputs, linears)
        return tuple(outputs) if x.ndim == 2 else tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._kept = None  # moved to another device or dtype
        return super()._apply(fn, recurse)


class FakeQuantizedLinear(FakeQuantized, Linear):
    """A dense linear that is trained itself: its parameters keep their names, so whoever trains it need not know."""

    @classmethod
    def taking_over(cls, linear: Linear, scheme: Scheme, name: str) -> Self:
        """One that holds what ``linear`` holds, marks of an adapter too, and takes its place."""
        fake = cls.__new__(cls)
        fake.__dict__.update(linear.__dict__)
        fake.scheme, fake.full_name = scheme, name
        return fake

    def _sources(self) -> list[torch.Tensor]:
        return [self.weight]

    def _quantized(self) -> QuantizedLinear:
        return QuantizedLinear.from_dense(self, self.scheme, name=self.full_name)


class FakeQuantizedAdapted(FakeQuantized):
    """A dense linear with an adapter: base and adapter are quantized as one weight."""

    def __init__(self, adapted: Foldable, scheme: Scheme, name: str) -> None:
        super().__init__()
        self.adapted: Any = adapted
        self.scheme, self.full_name = scheme, name
        self.in_features, self.out_features = adapted.in_features, adapted.out_features

    def _sources(self) -> list[torch.Tensor]:
        own = chain(self.adapted.named_parameters(), self.adapted.named_buffers())
        return [tensor for name, tensor in own if not name.startswith("base.")]

    def _quantized(self) -> QuantizedLinear:
        return _quantized_sum(self.adapted, self.scheme, self.full_name)


def _learn(
    x_TD: torch.Tensor, outputs: Sequence[torch.Tensor], linears: Sequence[nn.Module]
) -> tuple[torch.Tensor, ...]:
    """The outputs, with the straight-through gradient for what is trained."""
    learned = list(outputs)
    adapted = [i for i, one in enumerate(linears) if isinstance(one, FakeQuantizedAdapted)]
    if adapted:
        group: list[Any] = [linears[i].adapted for i in adapted]
        found = group[0].learn_together(x_TD, [outputs[i] for i in adapted], group)
        for i, y in zip(adapted, found, strict=True):
            learned[i] = y
    for i, one in enumerate(linears):
        if isinstance(one, FakeQuantizedLinear) and one.weight.requires_grad:
            learned[i] = weight_learn(learned[i], x_TD, one.weight)
    return tuple(learned)


def fake_quantize(model: nn.Module, plan: Plan) -> None:
    """Let a model, its adapter attached, be trained as what the plan makes of it; call it before the trainer is made.

    Linears of the plan that nothing trains are quantized here and now, for good. ``plan``: made of the model before the
    adapter was on it. ConfigError, and nothing is changed: a linear that is quantized already, a scheme that needs
    calibration rows, an adapter that is no change of the weight alone, nothing trained that would be quantized.
    """
    modules = {name: model.get_submodule(name) for name in plan.schemes}
    for name, module in modules.items():
        _check(name, module, plan.schemes[name])
    if not any(_is_trained(module) for module in modules.values()):
        raise ConfigError(
            "no weight is trained that would be quantized", field=FIELD,
            expected="a method that changes linears: lora, dora, pissa, adalora, freeze, full",
            fix="--quantize trains on a base that is quantized already",
        )  # fmt: skip
    for name, module in modules.items():
        scheme = plan.schemes[name]
        if not isinstance(module, Linear):
            _replace(model, name, FakeQuantizedAdapted(module, scheme, name))  # pyright: ignore[reportArgumentType]
        elif _is_trained(module):
            _replace(model, name, FakeQuantizedLinear.taking_over(module, scheme, name))
        else:
            _replace(model, name, QuantizedLinear.from_dense(module, scheme, name=name))


def fold(model: nn.Module, plan: Plan, *, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Quantize what each linear of the plan and its adapter, if it has one, merge to (float32), in place -> linear ->
    relative error of its weight; those that are quantized already stay as they are. The adapter is used up.

    Bit for bit what `fake_quantize` evaluates with, whether or not the model was trained so.
    """
    errors = {}
    for number, (name, scheme) in enumerate(plan.schemes.items()):
        module: Any = model.get_submodule(name)
        if isinstance(module, FakeQuantizedAdapted):
            module = module.adapted
        if isinstance(module, QuantizedLinear):
            continue
        with torch.no_grad():
            if isinstance(module, Linear):
                weight, packed = module.weight.detach(), QuantizedLinear.from_dense(module, scheme, name=name)
            else:
                weight = module.merged_weight()
                packed = _quantized_sum(module, scheme, name, weight)
            errors[name] = packed.relative_error(weight)
        _replace(model, name, packed)
        if on_progress is not None:
            on_progress(number + 1, len(plan.schemes), name)
    return errors


def _quantized_sum(adapted: Any, scheme: Scheme, name: str, merged: torch.Tensor | None = None) -> QuantizedLinear:
    """Of base and adapter as one weight, which is ``merged`` where it is known."""
    weight = adapted.merged_weight() if merged is None else merged
    packed = QuantizedLinear(
        adapted.in_features, adapted.out_features, scheme, dtype=adapted.base.weight.dtype, bias=_bias(adapted),
        device=weight.device,
    )  # fmt: skip
    packed.set_parts(scheme.quantize(weight, name=name))
    return packed


def _bias(adapted: Any) -> nn.Parameter | None:
    """The base's own, or a scaled copy of it where the adapter changes it."""
    if adapted.base.bias is None or hasattr(adapted, "learn_together"):
        return adapted.base.bias
    return nn.Parameter(adapted.bias.detach(), requires_grad=False)


def _check(name: str, module: nn.Module, scheme: Scheme) -> None:
    if scheme.needs_calibration:
        raise ConfigError(
            f"scheme {scheme.name} is made by running the model on rows, which changes with every step", field=FIELD,
            fix="int8_dynamic scales activations when they come",
        )  # fmt: skip
    dense = getattr(module, "base", module)
    if isinstance(dense, FakeQuantized) or not isinstance(dense, Linear):
        raise ConfigError(f"{name} is quantized already", field=FIELD, expected="a dense base model")
    if dense is not module and not isinstance(module, Foldable):
        raise ConfigError(
            f"the adapter of {name} ({type(module).__name__}) cannot learn through a quantized weight", field=FIELD,
            expected="method lora, dora, pissa, adalora, freeze or full",
        )  # fmt: skip


def _is_trained(module: nn.Module) -> bool:
    if isinstance(module, Linear):
        return module.weight.requires_grad
    return any(parameter.requires_grad for parameter in module.parameters())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
