"""``alpaca-lora pull NAME``: fetch a model into the cache, check it, and say what it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alpaca_lora.commands.schemas import PullConfig
from alpaca_lora.config import Resolved
from alpaca_lora.models.load import open_source
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.safetensors_file import file_sha256


def run(config: PullConfig, *, resolved: Resolved[PullConfig], console: Console) -> dict[str, Any]:
    """Fetch (or verify what is cached), open, describe.

    Returns ``base_model`` (the name asked for), ``path``, ``bytes`` and ``sha256``: of the file, or of a folder the
    sha256 over the lines "sha256  name" of its files in the order of their names. Errors as `resolve` and
    `open_source`.
    """
    path = resolve(
        config.name, verify=True, on_progress=lambda message: console.print(message, highlight=False, markup=False)
    )
    source = open_source(path)
    try:
        architecture, num_weights = source.config.get("model_type", "unknown"), len(source.shapes)
        notices = list(source.notices)
    finally:
        source.close()
    num_bytes, digest = _measure(path)
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("model", config.name),
        ("path", str(path)),
        ("size", f"{num_bytes / 1e6:.1f} MB"),
        ("sha256", digest),
        ("architecture", f"{architecture}, {num_weights} tensors"),
    ):
        table.add_row(label, value)
    console.print(table, highlight=False, markup=False)
    for notice in notices:
        console.print(notice, highlight=False, markup=False)
    return {"base_model": config.name, "path": str(path), "bytes": num_bytes, "sha256": digest}


def _measure(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file, or of a folder's files."""
    if path.is_file():
        return path.stat().st_size, file_sha256(path)
    files = sorted((file for file in path.iterdir() if file.is_file()), key=lambda file: file.name)
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return sum(file.stat().st_size for file in files), hashlib.sha256(lines.encode("utf-8")).hexdigest()
