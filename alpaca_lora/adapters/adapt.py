"""LoRA and its relatives on any `torch.nn.Module`, for somebody's own training loop.

    adapted = adapt(model, r=8)                              # every nn.Linear, everything else frozen
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    ...                                                      # model(x), loss.backward(), optimizer.step()
    adapted.save("folder")
    load_adapted(fresh_model, "folder")

Knows adapters and their folders; knows nothing of the model but its linears. PEFT loads the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from alpaca_lora import __version__
from alpaca_lora.adapters.any_model import fingerprint_of, target_entries, warnings_of
from alpaca_lora.adapters.base import Adapter, method_class
from alpaca_lora.adapters.linear_adapter import AdaptedLinear
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import CONFIG_NAME, load_adapter, method_of, read_config, save_adapter
from alpaca_lora.adapters.record import AdapterRecord, read_record
from alpaca_lora.adapters.targets import ALL_LINEAR, find_modules
from alpaca_lora.errors import AdapterError, ConfigError, nearest

METHODS = ("lora", "dora", "pissa", "ia3")  # what is a set of linears and needs nothing of the loop
# our options -> what they are called here
_NAMES: Mapping[str, str] = {
    "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target_modules": "targets",
    "ia3_feedforward_modules": "feedforward_modules",
}  # fmt: skip


class Adapted:
    """A model with an adapter on it: what to train, to save, and to do with it in the end.

    model: the module itself, changed in place. adapter: the method, see `adapters.base.Adapter`. messages: what the
    user should be told.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, record: AdapterRecord, asked: Mapping[str, bool]) -> None:
        self.model, self.adapter, self.record = model, adapter, record
        self._asked = dict(asked)  # which parameters wanted a gradient before
        self.messages = [*adapter.messages, *warnings_of(model)]

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to train, in a stable order; none after `load_adapted` without ``trainable``."""
        return [parameter for _, parameter in self.adapter.trained_parameters()]

    def state(self) -> dict[str, torch.Tensor]:
        """PEFT's name of each tensor of the adapter -> a copy on the CPU."""
        return self.adapter.state_tensors()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave. AdapterError when keys or shapes are not those of this adapter."""
        self.adapter.load_state_tensors(tensors)

    def save(self, folder: str | PathLike[str], *, allow_untrained: bool = False) -> str:
        """Write an adapter folder, read it back and compare it; returns the sha256 of the weights.

        AdapterError when the adapter did not move, unless `allow_untrained`; NaN or Inf are never saved.
        """
        return save_adapter(folder, self.adapter, self.record, allow_untrained=allow_untrained)

    def merge(self) -> nn.Module:
        """Fold the adapter into the model's own weights, take it off and return the model, which now needs neither.

        AdapterError when a weight is shared between modules: nothing is changed then.
        """
        self.adapter.merge()
        return self._unfreeze()

    def remove(self) -> nn.Module:
        """Take the adapter off and return the model, whose weights are what they were, bit for bit."""
        self.adapter.remove()
        return self._unfreeze()

    def _unfreeze(self) -> nn.Module:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._asked.get(name, False))
        return self.model

    def summary(self) -> str:
        """A table: each adapted linear, its shape (out x in), and how many numbers are trained there."""
        trained = {id(parameter) for parameter in self.parameters()}
        rows = [("module", "weight", "trained")]
        for name, module in self.model.named_modules():
            if isinstance(module, AdaptedLinear):
                number = sum(p.numel() for p in module.tensors().values() if id(p) in trained)
                rows.append((name, f"{module.out_features} x {module.in_features}", f"{number:,}"))
        for name, parameter in self.adapter.whole.parameters() if self.adapter.whole is not None else ():
            shape = " x ".join(map(str, parameter.shape))
            rows.append((name.removeprefix("base_model.model."), shape, f"{parameter.numel():,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {number:>{widths[2]}}" for name, shape, number in rows]
        total = sum(parameter.numel() for parameter in self.parameters())
        of_all = sum(parameter.numel() for parameter in self.model.parameters())
        share = 100 * total / of_all if of_all else 0.0
        return "\n".join(
            [*lines, f"method {self.adapter.method}: {total:,} of {of_all:,} numbers trained ({share:.2f} %)"]
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__})\n{self.summary()}"


def adapt(
    model: nn.Module, method: str = "lora", *, r: int = 8, alpha: float = 16, dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR, use_rslora: bool = False, seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (), feedforward_modules: Sequence[str] = (),
) -> Adapted:  # fmt: skip
    """Put an adapter on `model` in place and freeze all else. The model computes what it did until the first step.

    method: lora, dora, pissa or ia3. targets: names, ends of names or regular expressions; "all-linear" is every
    nn.Linear, heads included. r, alpha, dropout, use_rslora, rank_pattern, alpha_pattern: of all but ia3, whose
    feedforward_modules are the targets that it scales at the input. modules_to_save: trained wholly beside it, such as
    a new head. seed: of the start, which depends on it and on each linear's name only.

    Dropout is on where `model.train()` is, with torch's generator. The adapter is float32 whatever the model is.
    Raises ConfigError for what cannot be or names nothing, AdapterError when a target carries an adapter already.
    """
    if method not in METHODS:
        raise _unsuitable(method)
    lora_only = {"r": (r, 8), "alpha": (alpha, 16), "dropout": (dropout, 0.0), "use_rslora": (use_rslora, False),
                 "rank_pattern": (rank_pattern, None), "alpha_pattern": (alpha_pattern, None)}  # fmt: skip
    useless = [key for key, (value, default) in lora_only.items() if value != default] if method == "ia3" else []
    useless += ["feedforward_modules"] if method != "ia3" and feedforward_modules else []
    if useless:
        raise ConfigError(f"method {method} has none", field=useless[0], fix="leave it out")
    with _own_names():
        wholly = find_modules(model, [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save)
        entries, messages = target_entries(model, [targets] if isinstance(targets, str) else targets, wholly)
        settings = {
            "method": method, "lora_r": r, "lora_alpha": alpha, "lora_dropout": dropout, "lora_target_modules": entries,
            "use_rslora": use_rslora, "rank_pattern": _pairs(rank_pattern), "alpha_pattern": _pairs(alpha_pattern),
            "modules_to_save": wholly, "ia3_feedforward_modules": list(feedforward_modules),
        }  # fmt: skip
        options = AdapterOptions(**settings)
        asked, fingerprint = _asked(model), fingerprint_of(model, wholly)
        adapter = method_class(method).attach(model, options, seed=seed)
    adapter.messages += messages
    if isinstance(adapter, Lora):
        adapter.rows.automatic = True
    record = AdapterRecord(type(model).__name__, fingerprint, config={**settings, "seed": seed}, version=__version__)
    return Adapted(model, adapter, record, asked)


def load_adapted(
    model: nn.Module, folder: str | PathLike[str], *, trainable: bool = False, ignore_base_mismatch: bool = False
) -> Adapted:
    """Put the adapter that `Adapted.save` (or PEFT) wrote on `model`, which must be as the one it was trained on.

    trainable: to train it further. AdapterError: a model with other weights (unless `ignore_base_mismatch`), tensors
    that do not fit, a method that `adapt` has not; the errors of reading are those of `load_adapter`.
    """
    config = read_config(folder)
    method = method_of(config)
    if method not in METHODS:
        raise AdapterError(
            f"holds method {method}, which is not for any model", file=Path(folder) / CONFIG_NAME,
            expected=f"one of {', '.join(METHODS)}",
        )  # fmt: skip
    found = read_record(folder)
    wholly = config.get("modules_to_save") or []
    asked, fingerprint = _asked(model), fingerprint_of(model, wholly)
    adapter, _ = load_adapter(
        folder, model, fingerprint, trainable=trainable, ignore_base_mismatch=ignore_base_mismatch
    )
    if isinstance(adapter, Lora):
        adapter.rows.automatic = trainable
    record = found or AdapterRecord(type(model).__name__, fingerprint, version=__version__)
    return Adapted(model, adapter, record, asked)


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors of the options in the words of `adapt`."""
    try:
        yield
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field = str(detail["loc"][0]) if detail["loc"] else ""
        what = f"{detail['input']!r} is not possible: {detail['msg']}"
        raise ConfigError(what, field=_NAMES.get(field, field)) from error
    except ConfigError as error:
        field = _NAMES.get(error.field or "", error.field)
        raise ConfigError(error.what, field=field, expected=error.expected, fix=error.fix) from error


def _asked(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _pairs(pattern: Mapping[str, Any] | None) -> list[str]:
    return [f"{name}={value}" for name, value in (pattern or {}).items()]


def _unsuitable(method: str) -> ConfigError:
    expected, command = f"one of {', '.join(METHODS)}", "use `alpaca-lora finetune`"
    if method in ("prefix", "prompt"):
        what, fix = "puts tokens before a text, which this model need not have", command
    elif method == "adalora":
        what, fix = "changes ranks and the optimizer's state as it trains", command
    elif method in ("freeze", "bitfit", "full"):
        what, fix = "puts nothing on a model", "set requires_grad and give the optimizer what is to train"
    else:
        alike = nearest(method, METHODS)
        what, fix = "is unknown", f"did you mean {alike[0]!r}?" if alike else None
    return ConfigError(f"{method!r} {what}", field="method", expected=expected, fix=fix)
