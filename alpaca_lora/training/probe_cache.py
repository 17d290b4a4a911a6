"""Measured probes of earlier runs, so that a run like one before it starts at once. Knows files, not models.

A probe is kept under the hash of all that it depends on: base, adapter, rows, sizes, machine. Whether its memory is
free today is asked anew each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.preflight import Probe


class ProbeCache:
    """One file in ``folder`` for the probe of ``facts`` (JSON values)."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:32]}.json"

    def recall(self) -> Probe | None:
        """The probe measured before; None where there is none, or what is there is not one."""
        try:
            return Probe.from_record(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # a lost or foreign file costs two steps, nothing else
            return None

    def remember(self, probe: Probe) -> bool:
        """Keep the probe; False where the folder cannot be written, which costs the next run two steps."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(probe.to_record()).encode())
        except OSError:
            return False
        return True
