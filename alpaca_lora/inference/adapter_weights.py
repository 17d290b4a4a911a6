"""From the tensors of an adapter file to what is kept of them in memory: the same numbers that an adapter attached
alone computes with. Knows PEFT's keys and the base; knows no folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import nn

from alpaca_lora.adapters.dora import MAGNITUDE, DoRALinear
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.adapters.lora_linear import DropoutRows
from alpaca_lora.adapters.prefix import PlainPrefix
from alpaca_lora.adapters.prompt import SoftPrompt
from alpaca_lora.adapters.virtual_tokens import KEY
from alpaca_lora.adapters.whole_modules import PEFT_PREFIX
from alpaca_lora.errors import NumericalError
from alpaca_lora.inference.banked_linear import BankedLinear, BankRows
from alpaca_lora.inference.loaded_adapter import LowRank
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.classifier import SCORE_WEIGHT, Score
from alpaca_lora.models.decoder import CausalLM

# norm of an update above which hidden states could leave float32 where norms square them; trained ones are below 100
MAX_UPDATE = 1e8


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """As the fields of `LoadedAdapter`."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    num_virtual: int = 0
    prefix: list[KeysValues] | None = None
    score: Score | None = None

    @classmethod
    def make(
        cls, model: CausalLM, method: str, settings: Mapping[str, Setting], labels: Sequence[str],
        tensors: Mapping[str, torch.Tensor], rows: BankRows, *, file: str | PathLike[str],
    ) -> AdapterWeights:  # fmt: skip
        """Of checked tensors by PEFT key. NumericalError for what is not finite, or would not stay so."""
        with torch.inference_mode(False), torch.no_grad(), rows.base_only():
            score = _score(model, labels, tensors) if labels else None
            if settings:
                return cls({n: _low_rank(model, method, n, s, tensors, file) for n, s in settings.items() if s.rank},
                           score=score)  # fmt: skip
            table_PC = tensors[KEY].to(_place(model), torch.float32)
            tokens = PlainPrefix(table_PC, model) if method == "prefix" else SoftPrompt(table_PC, model)
            prefix = [(k.detach().clone(), v.detach().clone()) for k, v in tokens.keys_values()]
            for pair in prefix:
                _check_finite(pair, KEY, file)
            return cls(num_virtual=len(table_PC), prefix=prefix, score=score)


def num_bytes_of(model: CausalLM, method: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What `AdapterWeights.make` will hold of tensors with these shapes."""
    itemsize, total = model.embeddings.weight.dtype.itemsize, 0
    for key, shape in shapes.items():
        leaf = key.removesuffix(".weight").rpartition(".")[2]
        if leaf in ("lora_A", "lora_B"):
            total += shape[0] * shape[1] * itemsize
        elif leaf == MAGNITUDE:
            total += 2 * 4 * shape[0]
        elif leaf == "score":
            total += 4 * shape[0] * shape[1]
        elif key == KEY:
            config = model.config
            width = config.num_layers * 2 * config.num_key_value_heads * config.head_dim
            total += shape[0] * width * itemsize
    return total


def _low_rank(
    model: CausalLM, method: str, name: str, setting: Setting, tensors: Mapping[str, torch.Tensor],
    file: str | PathLike[str],
) -> LowRank:  # fmt: skip
    device = _place(model)
    suffix = "" if method == "adalora" else ".weight"

    def tensor(leaf: str) -> torch.Tensor:
        return tensors[f"{PEFT_PREFIX}{name}.{leaf}"].to(device, torch.float32)

    a_RD, b_OR = tensor(f"lora_A{suffix}"), tensor(f"lora_B{suffix}")
    if method == "adalora":
        a_RD = tensor("lora_E") * a_RD
    size = setting.scale * float(a_RD.norm(dtype=torch.float64)) * float(b_OR.norm(dtype=torch.float64))
    if not size <= MAX_UPDATE:
        raise NumericalError(
            f"scale and weights come to an update of norm up to {size:.3g}", file=file, field=name,
            expected=f"at most {MAX_UPDATE:g}", fix="use an earlier checkpoint",
        )  # fmt: skip
    magnitude_O = inverse_norm_O = None
    if method == "dora":
        magnitude_O = tensor(MAGNITUDE)
        base: nn.Module = model.get_submodule(name)
        base = base.base if isinstance(base, BankedLinear) else base
        layer = DoRALinear(base, a_RD, b_OR, setting.scale, DropoutRows(0.0), 0, magnitude_O)
        inverse_norm_O = layer.inverse_norm().detach()
        _check_finite((magnitude_O * inverse_norm_O,), f"{name}.{MAGNITUDE}", file)
    dtype = model.embeddings.weight.dtype
    return LowRank(a_RD.to(dtype), b_OR.to(dtype), setting.scale, magnitude_O, inverse_norm_O)


def _score(model: CausalLM, labels: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Score:
    score = Score(model.config.hidden_size, labels, device=_place(model))
    (weight,) = (tensor for key, tensor in tensors.items() if key.endswith("." + SCORE_WEIGHT))
    score.weight.copy_(weight)
    return score


def _place(model: CausalLM) -> torch.device:
    return model.embeddings.weight.device


def _check_finite(tensors: Sequence[Any], name: str, file: str | PathLike[str]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NumericalError("comes to NaN or Inf with this base", file=file, field=name)
