"""Freezing: train some modules of the model themselves and leave the rest alone; no weight is added.

What lies below the lowest trained module gets no gradient, no optimizer state and no backward pass: nothing there asks
for one, so autograd does not go there. `bitfit` and `full` are this class with another choice of what is trained.

PEFT keeps such an adapter as a LORA file without targets: modules_to_save and bias say what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter, EncodeText
from alpaca_lora.adapters.linear_adapter import check_free
from alpaca_lora.adapters.lora_config import DEFAULTS, NO_TARGETS, check_config
from alpaca_lora.adapters.targets import HEAD_OF_CLASSES, find_modules, task_type
from alpaca_lora.adapters.whole_modules import HEAD, WholeModules, embedding_name, is_tied, matching
from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.layers import LayerNorm, RMSNorm
from alpaca_lora.models.linear import PackedLinear

NORMS = (RMSNorm, LayerNorm, nn.RMSNorm, nn.LayerNorm)


class Freeze(Adapter):
    """The adapter: the modules that are trained, `whole`, and the frozen rest."""

    method = "freeze"
    peft_type = "LORA"

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """Freeze all of `model` but what `adapters.options.AdapterOptions` say; the values are the base's.

        Raises ConfigError: a module that does not exist, more layers than there are. AdapterError: the model carries
        an adapter already.
        """
        check_free(model)
        messages: list[str] = []
        names, parameters = cls._chosen(model, options, messages)
        model.requires_grad_(False)
        whole = WholeModules.train(model, names, parameters, field=cls._field(options))
        config = {
            **DEFAULTS,
            "bias": "all" if parameters else "none",
            "target_modules": NO_TARGETS,
            "task_type": task_type(model),
            **whole.config_keys(),
        }
        return cls(model, config, messages, whole)

    @classmethod
    def _field(cls, options: Any) -> str:
        """The option that says what is trained."""
        return "trained_modules" if options.trained_modules else "train_last_layers"

    @classmethod
    def _chosen(cls, model: nn.Module, options: Any, messages: list[str]) -> tuple[list[str], list[str]]:
        """(full names of modules, of single parameters besides) that the options mean."""
        if options.trained_modules:
            return find_modules(model, options.trained_modules, field="trained_modules"), []
        layers, count = layer_names(model), options.train_last_layers
        if count > len(layers):
            raise ConfigError(
                f"{count} of {len(layers)} layers", field="train_last_layers", expected=f"at most {len(layers)}",
                fix="name trained_modules" if not layers else "method full trains the embedding, too",
            )  # fmt: skip
        head = [HEAD_OF_CLASSES] if getattr(model, HEAD_OF_CLASSES, None) is not None else []
        if count:
            return [*layers[-count:], *final_norms(model), *head], []
        if not head and is_tied(model):
            head = [embedding_name(model)]
            messages.append(
                f"the head of this model is its embedding (tied): {head[0]} is trained, which is both, and so the "
                "backward pass goes through all layers"
            )
        return head or find_modules(model, [HEAD], field="train_last_layers"), []

    @classmethod
    def expected_shapes(
        cls, model: nn.Module, config: Mapping[str, Any], *, file: str | PathLike[str]
    ) -> dict[str, tuple[int, ...]]:
        """As `Adapter.expected_shapes`; AdapterError when the file trains nothing."""
        check_config({**config, "bias": "none"}, file=file)
        shapes = WholeModules.expected_shapes(
            model, config.get("modules_to_save"), file=file, tied=bool(config.get("ensure_weight_tying")),
            parameters=_saved_biases(model, config, file),
        )  # fmt: skip
        if not shapes:
            raise AdapterError("names nothing that is trained", file=file, field="modules_to_save")
        return shapes

    @classmethod
    def from_peft(
        cls, model: nn.Module, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, trainable: bool,
        file: str | PathLike[str],
    ) -> Self:  # fmt: skip
        """Put saved modules in the place of the base's, whatever the method that trained them."""
        check_free(model)
        messages = check_config({**config, "bias": "none"}, file=file)
        model.requires_grad_(False)
        whole = WholeModules.from_tensors(
            model, tensors, config.get("modules_to_save"), trainable=trainable,
            parameters=_saved_biases(model, config, file),
        )  # fmt: skip
        adapter = cls(model, dict(config), messages, whole)
        if not any(adapter.moved().values()):
            messages.append(f"{file}: the adapter changes nothing: all its modules are the base's")
        return adapter

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())

    def _moved(self) -> dict[str, float]:
        return {}

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._attached().merged_tensors()

    def merge(self) -> None:
        """Leave the trained values in the model, as its own. NumericalError when one is not finite; nothing is changed
        then.
        """
        whole = self._attached()
        for _ in whole.merged_tensors():
            pass
        whole.keep()
        self.whole = None

    def remove(self) -> None:
        """Put the base's own values back, bit for bit. AdapterError when they are there already."""
        self._attached().restore()
        self.whole = None

    def facts(self) -> list[tuple[str, str]]:
        """Of the method report: how much is trained, how far backward goes, which module changed most of its norm, and
        how many had none.
        """
        whole = self._attached()
        count, total = sum(p.numel() for _, p in whole.parameters()), sum(p.numel() for p in self.model.parameters())
        total += sum(module.num_weights for module in self.model.modules() if isinstance(module, PackedLinear))
        relative = whole.relative()
        grown = {name: share for name, share in relative.items() if math.isfinite(share)}
        lines = [("trained weights", f"{count:,} of {total:,}, {count / total:.2%}")]
        if grown:
            most = max(grown, key=lambda name: grown[name])
            lines.append(("largest change", f"{grown[most]:.2%} of its norm, {most}"))
        if from_zero := len(relative) - len(grown):
            lines.append(("from zero", f"{from_zero} modules whose trained weights were all zero at the start"))
        if layers := layer_names(self.model):
            lines.append(("layers without a backward pass", f"{frozen_below(self.model)} of {len(layers)}"))
        return lines

    def _attached(self) -> WholeModules:
        if self.whole is None:
            raise AdapterError("the adapter is not on the model any more: it was merged or removed")
        return self.whole


def layer_names(model: nn.Module) -> list[str]:
    """Full names of a language model's decoder layers, lowest first; none for any other module."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in getattr(model, "layers", ()) if id(layer) in names]


def final_norms(model: nn.Module) -> list[str]:
    """Full names of the norms beside the decoder layers: the one before the head."""
    parent = layer_names(model)[0].rpartition(".")[0].rpartition(".")[0]
    children = model.get_submodule(parent).named_children()
    return [f"{parent}.{name}" for name, module in children if isinstance(module, NORMS)]


def frozen_below(model: nn.Module) -> int:
    """Number of decoder layers from the bottom up that no backward pass goes through."""
    if model.get_submodule(embedding_name(model)).weight.requires_grad:
        return 0
    layers = [model.get_submodule(name) for name in layer_names(model)]
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))


def bias_names(model: nn.Module) -> list[str]:
    """Full names of all biases, as PEFT's ``bias: all`` finds them."""
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def _saved_biases(model: nn.Module, config: Mapping[str, Any], file: str | PathLike[str]) -> list[str]:
    """The biases that a file holds besides its modules."""
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"is {bias!r}", file=file, field="bias", expected="none, all or lora_only")
    if bias != "all":  # without targets there are none of lora_only
        return []
    modules = tuple(f"{name}." for name in matching(model, config.get("modules_to_save") or ()))
    return [name for name in bias_names(model) if not name.startswith(modules)]
