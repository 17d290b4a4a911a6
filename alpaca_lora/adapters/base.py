"""What every adaptation method is, and the table of methods.

A new method is one file here, one line in `METHODS`, one test file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, Protocol

import torch
from torch import nn

from alpaca_lora.errors import ConfigError, nearest

METHODS: Mapping[str, str] = {
    "lora": "alpaca_lora.adapters.lora:Lora",
}


class Adapter(Protocol):
    """A method attached to a model. `attach` works on any `nn.Module` that holds linears, not only on our decoders."""

    method: str
    peft_type: str  # PEFT's name of the method
    config: dict[str, Any]  # PEFT's adapter_config.json keys of this method
    messages: list[str]  # what the user should be told, for example a rank larger than the weight's own

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int) -> Adapter:
        """Put the adapter on `model` in place. Raises ConfigError / AdapterError when a target does not exist."""
        ...

    @classmethod
    def expected_shapes(
        cls, model: nn.Module, config: Mapping[str, Any], *, file: str | PathLike[str]
    ) -> dict[str, tuple[int, ...]]:
        """PEFT key -> shape of all that a file with this adapter_config must hold for `model`, which stays untouched.

        AdapterError when the configuration cannot be right, is not supported, or names nothing in `model`.
        """
        ...

    @classmethod
    def from_peft(
        cls, model: nn.Module, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, trainable: bool,
        file: str | PathLike[str],
    ) -> Adapter:  # fmt: skip
        """Put a saved adapter on `model` in place; `tensors` have the keys and shapes of `expected_shapes`."""
        ...

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that the optimizer may change, in a stable order; float32."""
        ...

    def set_rows(self, row_keys_T: torch.Tensor | None) -> None:
        """Key the dropout of the next forward by row (int32, see `kernels.dropout`); None: no dropout (evaluation)."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each optimizer step (AdaLoRA's allocator); most methods do nothing."""
        ...

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a PEFT file of this adapter holds: PEFT key -> float32 tensor."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_tensors` gave. AdapterError when keys or shapes are not those of this adapter."""
        ...

    def moved(self) -> dict[str, float]:
        """Norm of each module's update since the start (lora_B's norm); all zero means the method did not act."""
        ...

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of a base weight, its merged value in float32) one at a time; the model stays as it is."""
        ...

    def merge(self) -> None:
        """Fold the adapter into the base weights in float32 and take it off the model."""
        ...

    def remove(self) -> None:
        """Take the adapter off the model, whose base weights were never touched."""
        ...


def method_class(name: str) -> type[Adapter]:
    """The class of method `name`; ConfigError naming the nearest when there is none."""
    if name not in METHODS:
        hint = nearest(name, METHODS)
        raise ConfigError(
            f"unknown method {name!r}",
            field="method",
            expected=f"one of {', '.join(METHODS)}",
            fix=f"did you mean {hint[0]!r}?" if hint else None,
        )
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
