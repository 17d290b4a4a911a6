"""The plan: which linear of a model is stored by which scheme. A file, `quantization.json`, and a table for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from alpaca_lora.models.linear import Linear
from alpaca_lora.quantization.scheme import Scheme

PLAN_NAME = "quantization.json"
NEVER = ("lm_head", "score")  # heads stay dense unless a plan names them


@dataclass(frozen=True)
class Plan:
    """Name of a linear -> its scheme; linears that are not named stay dense."""

    schemes: Mapping[str, Scheme]

    @classmethod
    def uniform(cls, model: nn.Module, scheme: Scheme) -> Plan:
        """One scheme for every linear but the head."""
        return cls({name: scheme for name in linear_names(model) if name not in NEVER})

    def digest(self) -> str:
        """64 hexadecimal digits, equal for equal plans."""
        content = {name: scheme.to_json() for name, scheme in self.schemes.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def linear_names(model: nn.Module) -> list[str]:
    """Names of the dense linears, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]
