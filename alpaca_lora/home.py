"""Where things are kept between runs: fetched models, encoded rows, measured probes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$ALPACA_LORA_HOME``, else ``alpaca-lora`` in ``$XDG_CACHE_HOME``, else ``~/.cache/alpaca-lora``."""
    chosen, cache = os.environ.get("ALPACA_LORA_HOME"), os.environ.get("XDG_CACHE_HOME")
    path = Path(chosen) if chosen else Path(cache or "~/.cache") / "alpaca-lora"
    try:
        return path.expanduser()
    except RuntimeError:
        # no HOME and a user without a name, as in containers, whose engines take / for it; not in /tmp, where another
        # user may have put something. Whoever cannot write here says so
        return Path("/", *path.parts[1:])
