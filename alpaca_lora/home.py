"""Where things are kept between runs: fetched models, encoded rows, measured probes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$ALPACA_LORA_HOME``, else ``alpaca-lora`` in ``$XDG_CACHE_HOME``, else ``~/.cache/alpaca-lora``."""
    if chosen := os.environ.get("ALPACA_LORA_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "alpaca-lora"
