"""The base model of a command: as it is stored, quantized as asked for, or as an adapter was trained on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord, read_record
from alpaca_lora.device import Compute
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.load import Base
from alpaca_lora.quantization.folder import is_quantized
from alpaca_lora.quantization.load import load_base
from alpaca_lora.quantization.plan import Plan
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
    plan_of = None
    if asked.quantization_plan is not None:
        plan_of = partial(Plan.from_file, path=asked.quantization_plan)
    elif asked.quantize is None and lora_weights is not None:
        entries = trained_on(lora_weights)
        # a quantized folder has its own form; the fingerprint says whether it is the one that was trained on
        if entries and not is_quantized(resolve(asked.base_model)):
            say("the base is quantized as the adapter was trained on it")
            plan_of = partial(Plan.from_entries, entries=entries, file=Path(lora_weights) / RECORD_NAME)
    return load_base(asked.base_model, compute, quantize=asked.quantize, plan_of=plan_of)


def trained_for(lora_weights: str, model: CausalLM) -> Plan | None:
    """The plan that a quantization-aware run trained for, of a dense base without its adapter; None for other runs."""
    record = _record(lora_weights)
    if record is None or not record.quantization_aware:
        return None
    asked = record.quantization_aware
    return Plan.uniform(model, str(asked["scheme"]), asked.get("settings"))


def trained_on(lora_weights: str) -> list[Any]:
    """The plan by which the run that made an adapter quantized its base while loading it; empty where it did not."""
    record = _record(lora_weights)
    return record.base_plan if record is not None else []


def _record(lora_weights: str) -> AdapterRecord | None:
    folder = Path(lora_weights)
    return read_record(folder) if os.path.isdir(folder) else None  # also names that no folder can have
