"""Modules that are trained wholly, in place: PEFT's modules_to_save, a classifier's head, all of freeze, bitfit, full.

Knows modules, parameters and PEFT's names; knows no method. Where the head is the embedding (tied), training the
embedding trains both; a file in which the two differ gives the model a head of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from torch import nn

from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from alpaca_lora.models.classifier import Score
from alpaca_lora.models.layers import LayerNorm, RMSNorm
from alpaca_lora.models.linear import Linear, PackedLinear

PEFT_PREFIX = "base_model.model."
HEAD = "lm_head"
CLASS_HEADS = ("classifier", "score")  # PEFT adds both to each SEQ_CLS file, whichever the model has
CHUNK = 2**22  # elements that are widened to float32 at a time
MARK = "_trained_wholly"  # attribute of a module whose own parameters an adapter has taken over


class WholeModules:
    """Parameters of a model that are trained themselves, with the values they had before.

    They keep the base's storage dtype, so that a trained layer runs as fast as a frozen one and a file is as small as
    the base's; the float32 master is the optimizer's. Only what is tiny or new is float32: norms and biases of our own
    layers (values near 1 bfloat16 rounds to steps of 0.008, more than many a run moves them), and a classifier's head.

    names: the modules as PEFT is told of them; parameters: full name -> parameter, in the model's order.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], parameters: Mapping[str, nn.Parameter],
        initial: Mapping[str, torch.Tensor], *, untied: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.names = model, tuple(names)
        self._parameters, self._initial = dict(parameters), dict(initial)
        self._untied = untied  # the head was the embedding before
        for module in self._owners():
            setattr(module, MARK, True)

    # ---- made

    @classmethod
    def train(
        cls, model: nn.Module, names: Sequence[str], parameters: Sequence[str] = (), *, field: str = "modules_to_save"
    ) -> Self:
        """Train the modules with these full names, and single parameters besides (BitFit's biases).

        Freeze what is to be frozen before: this only asks for gradients. Raises ConfigError for a module without
        weights or with quantized ones, for the head of a tied model, and for names that PEFT could not tell from
        others; ``field``: the option that named them.
        """
        names = outermost(names)
        if packed := packed_inside(model, names):
            raise ConfigError(
                f"{packed[0]} is quantized: its weights cannot be trained", field=field, expected="dense modules",
                fix="train beside them (method lora), or for them: a dense base with --quantization_aware",
            )  # fmt: skip
        if HEAD in names and is_tied(model):
            embedding = embedding_name(model)
            raise ConfigError(
                "the head of this model is its embedding (tied) and has no weights of its own",
                field=field, fix=f"name {embedding}, which trains both",
            )  # fmt: skip
        for name in names:
            if next(model.get_submodule(name).parameters(), None) is None:
                raise ConfigError(f"{name} has no weights to train", field=field)
        _check_told_apart(model, names, field)
        own = _parameters_of(model, names, parameters)
        initial: dict[str, torch.Tensor] = {}
        for name, parameter in own.items():
            initial[name] = parameter.data
            parameter.data = parameter.data.to(_dtype(model, name, parameter), copy=True)
            parameter.requires_grad_(True)
        return cls(model, names, own, initial)

    @classmethod
    def from_tensors(
        cls, model: nn.Module, tensors: Mapping[str, torch.Tensor], entries: Sequence[str] | None, *, trainable: bool,
        parameters: Sequence[str] = (),
    ) -> Self | None:  # fmt: skip
        """Put saved values in place; the base's own stay at hand for `moved` and `restore`, without a second copy.

        ``tensors``: PEFT key -> value of (at least) all that `expected_shapes` names for these entries. None when they
        name nothing. On a tied model the head gets weights of its own unless embedding and head are both in the file
        and equal.
        """
        names = matching(model, entries or ())
        if not names and not parameters:
            return None
        untied = is_tied(model) and _differ(model, tensors)
        if untied:
            _untie(model)
            if f"{PEFT_PREFIX}{HEAD}.weight" in tensors:
                names = outermost([*names, HEAD])
        elif is_tied(model):
            names = [name for name in names if name != HEAD]
        own = _parameters_of(model, names, parameters)
        initial: dict[str, torch.Tensor] = {}
        for name, parameter in own.items():
            value = tensors[PEFT_PREFIX + name]
            initial[name] = parameter.data
            parameter.data = value.to(parameter.device, _dtype(model, name, parameter), copy=True)
            parameter.requires_grad_(trainable)
        return cls(model, names, own, initial, untied=untied)

    @staticmethod
    def expected_shapes(
        model: nn.Module, entries: Sequence[str] | None, *, file: str | PathLike[str], tied: bool = False,
        parameters: Sequence[str] = (),
    ) -> dict[str, tuple[int, ...]]:  # fmt: skip
        """PEFT key -> shape of what a file holds for these modules_to_save; ``tied``: its ensure_weight_tying.

        AdapterError when an entry names nothing in this model.
        """
        if not (isinstance(entries, list | tuple) or entries is None) or not all(type(e) is str for e in entries or ()):
            raise AdapterError(f"is {entries!r}", file=file, field="modules_to_save", expected="names of modules")
        names = matching(model, entries or ())
        if packed := packed_inside(model, names):
            raise AdapterError(
                f"{packed[0]} is quantized here, the file holds its dense weights", file=file, field="modules_to_save",
                fix="use it on the dense base",
            )  # fmt: skip
        for entry in entries or ():
            if entry not in CLASS_HEADS and not any(_ends(model, entry)):
                raise AdapterError(
                    f"{entry!r} names no module of this model", file=file, field="modules_to_save",
                    fix="is this the right base model?",
                )  # fmt: skip
        own = _parameters_of(model, [name for name in names if name != HEAD or not is_tied(model)], parameters)
        shapes = {PEFT_PREFIX + name: tuple(parameter.shape) for name, parameter in own.items()}
        if is_tied(model):
            shape = tuple(model.embeddings.weight.shape)  # pyright: ignore
            if HEAD in names or (tied and f"{PEFT_PREFIX}{embedding_name(model)}.weight" in shapes):
                shapes[f"{PEFT_PREFIX}{HEAD}.weight"] = shape
        return shapes

    # ---- asked

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(PEFT key, parameter), each once: a tied head is its embedding."""
        return ((PEFT_PREFIX + name, parameter) for name, parameter in self._parameters.items())

    def covers(self, name: str) -> bool:
        """True for a module that is trained wholly, alone or as a part of one."""
        return any(name == own or name.startswith(own + ".") for own in self.names)

    def config_keys(self, *, tying: bool = True) -> dict[str, Any]:
        """What an adapter_config.json says of these modules. With a tied embedding: that PEFT shall tie, too; or, for
        the types that have no such key (``tying`` False), head and embedding both, which their values make equal.
        """
        if not self.copies():
            return {"modules_to_save": list(self.names) or None}
        if tying:
            return {"modules_to_save": list(self.names), "ensure_weight_tying": True}
        return {"modules_to_save": [*self.names, HEAD]}

    def copies(self) -> dict[str, str]:
        """PEFT key that a file holds besides -> key of the parameter that it is: the head of a tied embedding."""
        if not is_tied(self.model):
            return {}
        embedding = f"{embedding_name(self.model)}.weight"
        return {f"{PEFT_PREFIX}{HEAD}.weight": PEFT_PREFIX + embedding} if embedding in self._parameters else {}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """PEFT key -> value on the CPU, a copy, in the dtype it is trained in; what is tied is there twice."""
        tensors = {key: parameter.detach().to("cpu", copy=True) for key, parameter in self.parameters()}
        return tensors | {key: tensors[same] for key, same in self.copies().items()}

    def moved(self) -> dict[str, float]:
        """Norm of the change since the start of each module that holds weights (a linear, a norm)."""
        return {name: math.sqrt(change) for name, (change, _) in self._squares().items()}

    def relative(self) -> dict[str, float]:
        """`moved` over the norm that the module's weights had at the start; infinite from zero."""
        return {name: math.sqrt(c / s) if s else math.inf for name, (c, s) in self._squares().items()}

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of a weight, its value in float32), one at a time. NumericalError when one is not finite."""
        for name, parameter in self._parameters.items():
            if not torch.isfinite(parameter).all():
                raise NumericalError("the trained weight holds NaN or Inf", field=name, fix="use an earlier checkpoint")
            yield name, parameter.detach().float()
        if self._untied and f"{HEAD}.weight" not in self._parameters:
            yield f"{HEAD}.weight", self.model.lm_head.weight.detach().float()  # pyright: ignore

    # ---- ended

    def keep(self) -> None:
        """Make the trained values the model's own, in the base's dtype."""
        for name, parameter in self._parameters.items():
            parameter.data = parameter.data.to(self._initial[name].dtype)
            parameter.requires_grad_(False)
        self._let_go()

    def restore(self) -> None:
        """Put the values back that were there before, bit for bit."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = self._initial[name].to(parameter.device)
            parameter.requires_grad_(False)
        self._let_go()
        if self._untied:
            self.model.lm_head = None  # pyright: ignore

    def _let_go(self) -> None:
        for module in self._owners():
            delattr(module, MARK)
        self._parameters, self._initial = {}, {}

    def _owners(self) -> list[nn.Module]:
        """The modules that hold the parameters themselves, each once."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in self._parameters)
        return [self.model.get_submodule(name) for name in names]

    @torch.no_grad()
    def _squares(self) -> dict[str, tuple[float, float]]:
        """Module -> squared norms of its change and of its start."""
        found: dict[str, tuple[float, float]] = {}
        for name, parameter in self._parameters.items():
            change = start = 0.0
            now, before = parameter.reshape(-1), self._initial[name].to(parameter.device).reshape(-1)
            for first in range(0, now.numel(), CHUNK):
                wide = before[first : first + CHUNK].float()
                start += float(torch.linalg.vector_norm(wide)) ** 2
                change += float(torch.linalg.vector_norm(now[first : first + CHUNK].float() - wide)) ** 2
            module = name.rpartition(".")[0]
            other = found.get(module, (0.0, 0.0))
            found[module] = other[0] + change, other[1] + start
        return found


def is_tied(model: nn.Module) -> bool:
    """True for a language model whose head is its embedding and is in use: a classifier has another head."""
    return getattr(model, HEAD, False) is None and getattr(model, "score", None) is None


def embedding_name(model: nn.Module) -> str:
    """Full name of a language model's token embedding."""
    return next(name for name, module in model.named_modules() if module is model.embeddings)


def has_weights(module: nn.Module) -> bool:
    """Whether it holds parameters, or weights in a packed form."""
    return next(module.parameters(), None) is not None or isinstance(module, PackedLinear)


def packed_inside(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the packed linears among the modules called ``names`` and inside of them."""
    inside = tuple(f"{name}." for name in names)
    packed = (name for name, module in model.named_modules() if isinstance(module, PackedLinear))
    return [name for name in packed if name in names or name.startswith(inside)]


def outermost(names: Iterable[str]) -> list[str]:
    """Names without those that lie inside of another, in the order given: PEFT wraps each once."""
    names = list(dict.fromkeys(names))
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def matching(model: nn.Module, entries: Iterable[str]) -> list[str]:
    """Outermost modules with weights whose name ends with an entry, as PEFT reads modules_to_save; the head is one."""
    return outermost(name for entry in entries for name in _ends(model, entry))


def _ends(model: nn.Module, entry: str) -> Iterator[str]:
    for name, module in model.named_modules():
        if name and name.endswith(entry) and has_weights(module):
            yield name
    if is_tied(model) and HEAD.endswith(entry):
        yield HEAD


def _parameters_of(model: nn.Module, names: Sequence[str], parameters: Sequence[str]) -> dict[str, nn.Parameter]:
    """Full name -> parameter, in the model's order."""
    singles = set(parameters)
    inside = tuple(f"{name}." for name in names)
    own = {n: p for n, p in model.named_parameters() if n in singles or n.startswith(inside)}
    assert singles <= own.keys(), f"no such parameters: {sorted(singles - own.keys())[:3]}"
    return own


def carried_wholly(model: nn.Module) -> list[str]:
    """Names of the modules whose own parameters belong to an adapter, trained or loaded; "" is the model itself."""
    return [name for name, module in model.named_modules() if getattr(module, MARK, False)]


def _dtype(model: nn.Module, name: str, parameter: nn.Parameter) -> torch.dtype:
    """float32 only where the layer's forward takes it: other people's layers want one dtype for all they hold."""
    owner = model.get_submodule(name.rpartition(".")[0])
    is_small = parameter.ndim == 1 and isinstance(owner, RMSNorm | LayerNorm | Linear)
    return torch.float32 if is_small or isinstance(owner, Score) else parameter.dtype


def _check_told_apart(model: nn.Module, names: Sequence[str], field: str) -> None:
    """PEFT takes every module whose name ends with an entry, even in the middle of a word."""
    covered = tuple(f"{name}." for name in names)
    for name in names:
        for other in _ends(model, name):
            if other not in names and not other.startswith(covered):
                raise ConfigError(
                    f"PEFT would take {other} for {name}, because its name ends so", field=field,
                    fix=f"name {other} too, or rename the module",
                )  # fmt: skip


def _differ(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file gives a tied model an embedding and a head that are two."""
    embedding = tensors.get(f"{PEFT_PREFIX}{embedding_name(model)}.weight")
    head = tensors.get(f"{PEFT_PREFIX}{HEAD}.weight")
    if embedding is None or head is None:
        return (embedding is None) != (head is None)
    return not torch.equal(embedding, head)


def _untie(model: nn.Module) -> None:
    """Give the model a head of its own, with the embedding's values and, until one changes, its memory."""
    table = model.embeddings.weight  # pyright: ignore
    head = Linear(table.shape[1], table.shape[0], device="meta")  # pyright: ignore
    head.weight = nn.Parameter(table.data, requires_grad=False)  # pyright: ignore
    model.lm_head = head
