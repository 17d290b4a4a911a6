"""`alpaca-lora check`: everything that a run meets before its first step, shown; trains nothing, writes no output."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from alpaca_lora.commands.audit import audit
from alpaca_lora.commands.job import assemble
from alpaca_lora.commands.schemas import CheckConfig
from alpaca_lora.config import Resolved, dump
from alpaca_lora.errors import Stopped
from alpaca_lora.training.signals import Interrupted, SignalFlag


def run(config: CheckConfig, *, resolved: Resolved[CheckConfig], console: Console) -> dict[str, Any]:
    """Returns train_rows val_rows steps tokens_per_second needed_memory_bytes estimated_seconds ..., see `audit`."""
    console.print(dump(resolved))
    for notice in resolved.notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    with SignalFlag() as signals:
        try:
            return audit(assemble(config, console, signals), console, signals, measure_anew=True)
        except Interrupted as interrupted:
            raise Stopped(interrupted.signal_number, f"stopped by {interrupted}: nothing was written") from None
