"""The ops in C: compiled once with the machine's own compiler, kept in the cache, loaded by ctypes.

Where there is no compiler, where it fails, or with ALPACA_LORA_KERNELS=off, `library` gives none and the twins in plain
torch are used, which are slower. Work is shared among the threads that torch has already, where they are those of GNU's
OpenMP: a second set of threads would fight the first, which spins for a while after each of torch's own ops.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.device import cpu_flags
from alpaca_lora.home import home

SOURCES = ("few_rows.c", "four_bit.c", "paged_attention.c")
HEADERS = ("bfloat16.h", "threads.h", "vectors.h")
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
# for this very processor, by the first that the compiler knows
NATIVE = (("-march=native",), ("-mcpu=native",), ())
COMPILERS = ("cc", "gcc", "clang")
SWITCH = "ALPACA_LORA_KERNELS"
COMPILE_SECONDS = 120
WORK_PER_THREAD = 2**17  # weights; below it a thread costs more than it saves


@dataclass(frozen=True)
class Library:
    """handle: the loaded library, or None. reason: which ops are in use and why, for one line to the user."""

    handle: ctypes.CDLL | None
    reason: str

    def call(self, name: str, *arguments: Any, work: int) -> int:
        """Call an op, whose last two arguments (threads, who runs them) are added: one thread for each
        `WORK_PER_THREAD` of ``work``, up to torch's own number. Whole numbers are passed as 64 bits, truth values as
        int, tensors as the address of their first element; the result is an int where the op has one.
        """
        assert self.handle is not None
        threads = max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))
        return getattr(self.handle, name)(*map(_argument, (*arguments, threads)), _gnu_openmp())


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if type(value) is int else value


@functools.cache
def library() -> Library:
    """Compile (the first time on a machine) and load; asked once per process."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return Library(None, f"plain torch ({SWITCH} is off)")
    compiler = find_compiler()
    if compiler is None:
        return Library(None, "plain torch (no C compiler here)")
    name, problem = Path(compiler[0]).name, "failed"
    for native in NATIVE:
        try:
            return Library(load(compiler, (*FLAGS, *native)), f"compiled by {name}")
        except (OSError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            problem = lines[0][:200] if lines else problem
    return Library(None, f"plain torch ({name}: {problem})")


def find_compiler() -> list[str] | None:
    """The words of the command: $CC, else the first C compiler on the path."""
    for command in (os.environ.get("CC", ""), *COMPILERS):
        words = shlex.split(command)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


def load(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library made with these flags. OSError or SubprocessError when it cannot be made or loaded."""
    path = compiled(compiler, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged, or made for a system that this one was before
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(compiled(compiler, flags)))


def compiled(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """The library's file, made if it is not there; its name is the hash of all that it depends on."""
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True
    ).stdout  # fmt: skip
    machine = (platform.machine(), platform.processor(), *sorted(cpu_flags()))
    digest = hashlib.sha256("\0".join((*compiler, version, *flags, *machine)).encode())
    for source in (*sources, *(Path(__file__).with_name(name) for name in HEADERS)):
        digest.update(source.read_bytes())
    path = home() / "kernels" / f"{digest.hexdigest()[:32]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # written under another name and renamed: several processes may be at it
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "library.so"
        subprocess.run(
            [*compiler, *flags, "-o", str(made), *map(str, sources)], capture_output=True, text=True,
            timeout=COMPILE_SECONDS, check=True,
        )  # fmt: skip
        os.replace(made, path)
    return path


@functools.cache
def _gnu_openmp() -> ctypes.c_void_p | None:
    """Where GNU's OpenMP, if torch has loaded it, runs a function on its threads; None: nowhere."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # another runtime, or a system without such a list of names
        return None
