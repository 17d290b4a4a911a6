"""BitFit: train the biases and nothing else (Ben Zaken et al. 2022); where a model has none, as Llama, its norms.

The paper trains all bias terms, those of LayerNorm among them. A norm's weight is the multiplicative counterpart and as
small: with `bitfit_parts` it is trained beside the biases or in their place.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from alpaca_lora.adapters.freeze import NORMS, Freeze, bias_names
from alpaca_lora.adapters.targets import find_modules
from alpaca_lora.errors import ConfigError


class BitFit(Freeze):
    """``auto``: the biases, or the norms of a model without any; ``both``: both, with no bias needed.

    A norm is trained whole, with its bias if it has one, as PEFT keeps it.
    """

    method = "bitfit"

    @classmethod
    def _field(cls, options: Any) -> str:
        return "bitfit_parts"

    @classmethod
    def _chosen(cls, model: nn.Module, options: Any, messages: list[str]) -> tuple[list[str], list[str]]:
        parts, biases = options.bitfit_parts, bias_names(model)
        norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
        if parts == "auto":
            parts = "biases" if biases else "norms"
            if not biases:
                messages.append(f"this model has no biases: its {len(norms)} norms are trained in their place")
        if parts == "biases" and not biases:
            raise ConfigError(
                "this model has no biases", field="bitfit_parts", expected="auto, norms or both",
                fix="norms trains the weights of its norms",
            )  # fmt: skip
        if parts != "biases" and not norms:
            raise ConfigError("this model has no norms", field="bitfit_parts", expected="auto or biases")
        names = [*(norms if parts != "biases" else []), *find_modules(model, [])]
        inside = tuple(f"{name}." for name in names)
        return names, [] if parts == "norms" else [name for name in biases if not name.startswith(inside)]
