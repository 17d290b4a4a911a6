"""`alpaca-lora check`: everything a run would meet before its first step, shown, and nothing written or trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from alpaca_lora.commands.assemble import assemble
from alpaca_lora.commands.audit import audit
from alpaca_lora.commands.schemas import CheckConfig
from alpaca_lora.config import Resolved, dump
from alpaca_lora.training.signals import Interrupted, SignalFlag


def run(config: CheckConfig, *, resolved: Resolved[CheckConfig], console: Console) -> dict[str, Any]:
    """Returns rows_in rows_kept train_rows val_rows steps tokens_per_second peak_memory_bytes estimated_seconds ..."""
    console.print(dump(resolved))
    with SignalFlag() as signals:
        try:
            job = assemble(config, console, signals)
            return audit(job, console, signals, measure_anew=True)
        except Interrupted as interrupted:
            raise interrupted.stopped("nothing was trained or written") from None
