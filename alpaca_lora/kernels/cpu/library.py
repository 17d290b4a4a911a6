"""The ops in C: compiled once with the machine's own compiler, kept in the cache, loaded by ctypes.

Where there is no compiler, where it fails, or with ALPACA_LORA_KERNELS=off, `library` gives None and the twins in plain
torch are used: the results are the same bits, only slower. No OpenMP: a second runtime beside torch's would fight it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alpaca_lora.device import cpu_flags
from alpaca_lora.home import home

SOURCES = ("four_bit.c",)
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
SWITCH = "ALPACA_LORA_KERNELS"
COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Library:
    """handle: the loaded library, or None. reason: which ops are in use and why, for one line to the user."""

    handle: ctypes.CDLL | None
    reason: str


@functools.cache
def library() -> Library:
    """Compile (the first time on a machine) and load; asked once per process."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return Library(None, f"plain torch ({SWITCH} is off)")
    compiler = _compiler()
    if compiler is None:
        return Library(None, "plain torch (no C compiler here)")
    try:
        path = _compiled(compiler)
        return Library(ctypes.CDLL(str(path)), f"compiled by {Path(compiler).name}")
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return Library(None, f"plain torch ({Path(compiler).name}: {lines[0][:200] if lines else 'failed'})")


def _compiler() -> str | None:
    for name in (os.environ.get("CC", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def _compiled(compiler: str) -> Path:
    """The library's file, made if it is not there; its name is the hash of all that it depends on."""
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True
    ).stdout  # fmt: skip
    digest = hashlib.sha256("\0".join((version, *FLAGS, *sorted(cpu_flags()))).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = home() / "kernels" / f"{digest.hexdigest()[:32]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # written under another name and renamed: several processes may be at it
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "library.so"
        subprocess.run(
            [compiler, *FLAGS, "-o", str(made), *map(str, sources)], capture_output=True, text=True,
            timeout=COMPILE_SECONDS, check=True,
        )  # fmt: skip
        os.replace(made, path)
    return path
