"""The base model of a command: as it is stored, quantized as asked for, or as an adapter was trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from alpaca_lora.adapters.record import read_record
from alpaca_lora.device import Compute
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.folder import is_quantized
from alpaca_lora.quantization.load import load_base
from alpaca_lora.weights.hub import resolve


class Asked(Protocol):
    """The keys of models and quantization that a command's configuration has."""

    @property
    def base_model(self) -> str: ...
    @property
    def quantize(self) -> str | None: ...
    @property
    def quantization_plan(self) -> str | None: ...


def open_base(
    asked: Asked, compute: Compute, *, lora_weights: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Base:
    """Load the base; where nothing is said of quantization, as ``lora_weights`` says that it was trained.

    Errors as `quantization.load.load_base`.
    """
    quantize, plan = asked.quantize, asked.quantization_plan
    if quantize is None and plan is None and lora_weights is not None:
        quantize, plan = trained_on(lora_weights)
        if (quantize or plan) and is_quantized(resolve(asked.base_model)):
            quantize = plan = None  # the folder's own form; the fingerprint says whether it is the same
        if quantize or plan:
            say(f"the base is quantized as the adapter was trained: {quantize or plan}")
    return load_base(asked.base_model, compute, quantize=quantize, plan_file=plan)


def trained_on(lora_weights: str) -> tuple[str | None, str | None]:
    """(quantize, quantization_plan) of the run that made an adapter; None both for adapters of other programs."""
    folder = Path(lora_weights)
    record = read_record(folder) if folder.is_dir() else None
    values = [record.config.get(key) if record is not None else None for key in ("quantize", "quantization_plan")]
    quantize, plan = (value if isinstance(value, str) else None for value in values)
    return quantize, plan
