"""What a benchmark ran on: the part of a result that makes its figures comparable."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.device import cpu_flags, physical_cores

RESULTS = Path(__file__).parent / "results"


def machine_card() -> dict[str, Any]:
    """Processor, cores, memory and versions; no names of hosts or users."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    meminfo = Path("/proc/meminfo")
    memory = int(meminfo.read_text().split()[1]) // 2**20 if meminfo.exists() else None
    return {
        "processor": model, "cores": physical_cores(), "memory_gib": memory, "python": platform.python_version(),
        "torch": torch.__version__,
        "instructions": sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}),
    }  # fmt: skip


def keep(name: str, result: dict[str, Any]) -> str:
    """Append the result with date and machine to results/NAME.jsonl; returns the line."""
    line = json.dumps({"date": datetime.date.today().isoformat(), **result, "machine": machine_card()})
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line
