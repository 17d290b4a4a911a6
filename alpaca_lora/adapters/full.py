"""Full fine-tuning: all weights of the model are trained, kept in PEFT's form of whole modules.

Only for a comparison, or for small models: with its optimizer state a weight takes 20 bytes, and the adapter file is as
large as the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from alpaca_lora.adapters.freeze import Freeze, layer_names
from alpaca_lora.adapters.targets import HEAD_OF_CLASSES
from alpaca_lora.adapters.whole_modules import HEAD


class Full(Freeze):
    """All modules with weights, but the language model's head where a classifier's is in its place."""

    method = "full"

    @classmethod
    def _field(cls, options: Any) -> str:
        return "method"

    @classmethod
    def _chosen(cls, model: nn.Module, options: Any, messages: list[str]) -> tuple[list[str], list[str]]:
        layers = set(layer_names(model))
        unused = HEAD if getattr(model, HEAD_OF_CLASSES, None) is not None else None
        return [name for name in _units(model, "", layers) if name != unused], []


def _units(module: nn.Module, name: str, layers: set[str]) -> Iterator[str]:
    """The largest modules that PEFT can wrap: layers, and what holds weights itself.

    Not the decoder as one: PEFT has to see the embedding by its name to tie the head to it.
    """
    if name and (name in layers or next(module.parameters(recurse=False), None) is not None):
        yield name
        return
    for leaf, child in module.named_children():
        yield from _units(child, f"{name}.{leaf}" if name else leaf, layers)
