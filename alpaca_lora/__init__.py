"""Fine-tune, check, merge and talk to LLaMA-class language models with low-rank adapters, on the machine you have.

The public names are imported when they are first used, so that ``import alpaca_lora`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpaca_lora.adapters.adapt import adapt, load_adapted
    from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
    from alpaca_lora.data.loader import Loader
    from alpaca_lora.data.prepare import prepare
    from alpaca_lora.device import pick_compute
    from alpaca_lora.errors import AlpacaLoraError
    from alpaca_lora.inference.engine import Engine
    from alpaca_lora.inference.request import SamplingParams
    from alpaca_lora.quantization.load import load_base
    from alpaca_lora.text.messages import Conversation, Message
    from alpaca_lora.text.templates import load_template
    from alpaca_lora.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AlpacaLoraError",
    "Conversation",
    "Engine",
    "Loader",
    "Message",
    "SamplingParams",
    "Trainer",
    "adapt",
    "load_adapted",
    "load_adapter",
    "load_base",
    "load_template",
    "pick_compute",
    "prepare",
    "save_adapter",
]

_HOMES = {
    "AlpacaLoraError": "errors",
    "Conversation": "text.messages",
    "Engine": "inference.engine",
    "Loader": "data.loader",
    "Message": "text.messages",
    "SamplingParams": "inference.request",
    "Trainer": "training.trainer",
    "adapt": "adapters.adapt",
    "load_adapted": "adapters.adapt",
    "load_adapter": "adapters.peft_format",
    "load_base": "quantization.load",
    "load_template": "text.templates",
    "pick_compute": "device",
    "prepare": "data.prepare",
    "save_adapter": "adapters.peft_format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
