"""What every adaptation method is, and the table of methods.

A new method is one file here, one line in `METHODS`, one test file.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from alpaca_lora.adapters.movement import Movement
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError, nearest

if TYPE_CHECKING:
    from alpaca_lora.adapters.whole_modules import WholeModules

METHODS: Mapping[str, str] = {
    "lora": "alpaca_lora.adapters.lora:Lora",
    "dora": "alpaca_lora.adapters.dora:Dora",
    "pissa": "alpaca_lora.adapters.pissa:Pissa",
    "adalora": "alpaca_lora.adapters.adalora:AdaLora",
    "ia3": "alpaca_lora.adapters.ia3:IA3",
    "prefix": "alpaca_lora.adapters.prefix:PrefixTuning",
    "prompt": "alpaca_lora.adapters.prompt:PromptTuning",
    "freeze": "alpaca_lora.adapters.freeze:Freeze",
    "bitfit": "alpaca_lora.adapters.bitfit:BitFit",
    "full": "alpaca_lora.adapters.full:Full",
}

EncodeText = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Kept:
    """Of a parameter that shrinks: the rows (``dim`` 0) or columns (1) that stay, in order; int64."""

    dim: int
    index: torch.Tensor


class Adapter(ABC):
    """A method attached to a model. `attach` works on any `nn.Module` that holds linears, not only on our decoders.

    config: PEFT's adapter_config.json keys. messages: what the user should be told, for example a rank larger than the
    weight's own. whole: modules that are trained wholly beside the method (modules_to_save, a classification head).
    movement: from `begin` on, where the trained parts started. num_trained: parameters trained then; a method may
    shrink.
    """

    method: ClassVar[str]
    peft_type: ClassVar[str]  # PEFT's name of the method
    mergeable: ClassVar[bool] = True  # whether base weights alone can come to the same

    def __init__(
        self, model: nn.Module, config: dict[str, Any], messages: list[str], whole: WholeModules | None = None
    ) -> None:
        self.model, self.config, self.messages, self.whole = model, config, messages, whole
        self.movement: Movement | None = None
        self.num_trained = 0

    # ---- what a method has to say

    @classmethod
    @abstractmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """Put the adapter on `model` in place and freeze all else. ``encode_text``: text to token ids, for methods that
        start from a text.

        Raises ConfigError / AdapterError when an option cannot be or a target does not exist.
        """

    @classmethod
    @abstractmethod
    def expected_shapes(
        cls, model: nn.Module, config: Mapping[str, Any], *, file: str | PathLike[str]
    ) -> dict[str, tuple[int, ...]]:
        """PEFT key -> shape of all that a file with this adapter_config must hold for `model`, which stays untouched.

        AdapterError when the configuration cannot be right, is not supported, or names nothing in `model`.
        """

    @classmethod
    @abstractmethod
    def from_peft(
        cls, model: nn.Module, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, trainable: bool,
        file: str | PathLike[str],
    ) -> Self:  # fmt: skip
        """Put a saved adapter on `model` in place; `tensors` have the keys and shapes of `expected_shapes`."""

    @abstractmethod
    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(PEFT key, parameter) of the method itself, in a stable order; those of `whole` left out."""

    @abstractmethod
    def _moved(self) -> dict[str, float]:
        """Norm of the change of each module since the start; those of `whole` left out."""

    @abstractmethod
    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of a base weight, its merged value in float32) one at a time; the model stays as it is.

        AdapterError when the method cannot be merged.
        """

    @abstractmethod
    def remove(self) -> None:
        """Take the adapter off the model, whose base weights are then what they were."""

    def merge(self) -> None:
        """Fold the adapter into the base weights in float32 and take it off the model."""
        raise AdapterError(f"method {self.method} cannot be merged in place", fix="use the merge command")

    # ---- what follows from it

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(PEFT key, parameter) of all that the optimizer may change, in a stable order; none of an adapter that was
        loaded to be used only.
        """
        return ((key, parameter) for key, parameter in self._all_parameters() if parameter.requires_grad)

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters()
        if self.whole is not None:
            yield from self.whole.parameters()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a PEFT file of this adapter holds: PEFT key -> tensor on the CPU, a copy; float32, whole modules in
        their own dtype.
        """
        own = {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in self._parameters()}
        return own | (self.whole.state_tensors() if self.whole is not None else {})

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_tensors` gave. AdapterError when keys or shapes are not those of this adapter."""
        own = dict(self._all_parameters())
        copies = self.whole.copies() if self.whole is not None else {}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in copies}
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
        self.set_rows(None)

    def moved(self) -> dict[str, float]:
        """Norm of each module's change since the start; all zero means the method did not act."""
        return self._moved() | (self.whole.moved() if self.whole is not None else {})

    def parts(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(module, part of it, parameter) of the method itself: A, B and so on apart."""
        return ((self.method, key, parameter) for key, parameter in self._parameters())

    # ---- what a method may do in training

    def set_rows(self, row_keys_T: torch.Tensor | None) -> None:  # noqa: B027
        """Key the dropout of the next forward by row (int32, see `kernels.dropout`); None: no dropout (evaluation).

        Also the sign that weights may have changed since the last forward.
        """

    def begin(self, total_steps: int) -> None:
        """Called before the first step of a run of ``total_steps``: what is compared with in the end starts here.
        ConfigError when the run is too short.
        """
        self.movement = Movement(self.parts())
        self.num_trained = sum(parameter.numel() for _, parameter in self.trained_parameters())

    def penalty(self) -> torch.Tensor | None:
        """A scalar added to the loss once per optimizer step (AdaLoRA's orthogonality); None: nothing."""
        return None

    def after_step(self, step: int) -> Mapping[str, Kept]:
        """Called after optimizer step ``step`` (from 0), its gradients still there. Returns what shrinks for good:
        parameter name -> what stays; the optimizer does it.
        """
        if self.movement is not None:
            self.movement.note(self.parts())
        return {}

    def learning_rate_ratio(self, name: str) -> float:
        """Learning rate of parameter ``name`` over the run's (LoRA+)."""
        return 1.0

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the trained parameters and the optimizer's averages."""
        return {}

    def load_extra_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Kept]:
        """Put back what `extra_state` gave, after `begin`. Returns what has shrunk already, as `after_step`."""
        if tensors:
            raise AdapterError(f"method {self.method} keeps no such state: {', '.join(sorted(tensors)[:3])}")
        return {}

    def is_settled(self) -> bool:
        """Whether its weights may be the run's last: False while AdaLoRA's ranks still fall."""
        return True

    def log_record(self) -> dict[str, Any]:
        """What the step's line in the log says of the method besides the loss."""
        return {}

    def check_acted(self) -> None:
        """NumericalError when the method did not do what it is for: here, when a part of a module (lora_A, a network's
        weight) stood still while others moved. That modules moved at all is checked apart from it.
        """
        for part, modules in (self.movement.stuck(self.parts()) if self.movement is not None else {}).items():
            raise NumericalError(
                f"{part} did not move in {len(modules)} modules whose other parts did: {', '.join(modules[:5])}",
                fix="check that the learning rate is not negligible",
            )

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) lines of the method report: budget reached, effective rank and so on."""
        return []


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
