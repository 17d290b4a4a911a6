"""The machine: device, dtype by instruction set, threads, seed, memory. The only module that asks for hardware.

Knows nothing of models. Everything is asked when a function is called and handed on as a value.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alpaca_lora.errors import MachineError

DEVICES = ("cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # constant
FAST_BF16_FLAGS = (
    "amx_bf16",
    "avx512_bf16",
)  # processors with neither convert to float32 and back, slower than float32
_SYSTEM_ROOT = Path("/")
# glibc's mallopt: number of the setting, value. Tensors of 8 MiB and more get memory of their own and give it back
# when they are freed; left to itself glibc raises that limit to 32 MiB and keeps them in a heap full of holes. Four
# layers of LLaMA-7B at 1024 tokens took 550 MB above their weights so, and 1,005 MB without, in the same time. And two
# heaps for all threads: each of a server's twenty kept up to 64 MB of its own, 570 MB after some minutes
MALLOC_SETTINGS = ((-3, 8 << 20), (-1, 64 << 20), (-8, 2))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


class _Scratch(threading.local):
    """Of each thread: dtype -> a vector that is written over and over."""

    def __init__(self) -> None:
        self.vectors: dict[torch.dtype, torch.Tensor] = {}


_SCRATCH = _Scratch()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised room on the processor that the next call in this thread hands out again. A new tensor of some
    megabytes would be new pages, which the system clears first: that takes longer than filling them.
    """
    numel = math.prod(shape)
    vector = _SCRATCH.vectors.get(dtype)
    if vector is None or vector.numel() < numel:
        with torch.inference_mode(False):
            vector = _SCRATCH.vectors[dtype] = torch.empty(numel, dtype=dtype)
    return vector[:numel].view(shape)


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in what the model computes. ``dtype`` is the storage and compute dtype of frozen weights."""

    device: torch.device
    dtype: torch.dtype
    num_threads: int
    reason: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def pick_compute(device: str = "auto", dtype: str = "auto", num_threads: int = 0) -> Compute:
    """Choose device, dtype and threads, and set torch's threads and denormal handling accordingly.

    `num_threads` 0: OMP_NUM_THREADS if it is set, else the physical cores this process may use. MachineError when a
    device is named that is not there.
    """
    name, device_reason = _pick_device(device)
    chosen = torch.device(name)
    picked, dtype_reason = _pick_dtype(chosen, dtype)
    threads, threads_reason = _pick_threads(num_threads)
    torch.set_num_threads(threads)
    # denormals in Adam's second moments slow a step down several times and change no result that matters
    torch.set_flush_denormal(True)
    give_freed_memory_back()
    return Compute(chosen, picked, threads, f"{device_reason}; {dtype_reason}; {threads_reason}")


def give_freed_memory_back() -> bool:
    """Have large tensors return their memory to the system once they are freed; False where the C library is not
    glibc, which alone is asked.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(setting, value) == 1 for setting, value in MALLOC_SETTINGS)
    except (OSError, AttributeError):
        return False


def give_holes_back() -> bool:
    """Return what has been freed between live small tensors to the system; False where that cannot be said. Takes some
    milliseconds: for the moment in which many of them have gone, as an adapter's have.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on all devices. Training draws from counters instead; this is for the rest."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Most memory held so far: of the process (resident), or of torch on `device` when that is a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device is not None and device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # not getrusage: its maximum survives exec, so that a child of a large process starts with the parent's peak
    peak = _status_bytes("VmHWM")
    return peak if peak is not None else _getrusage_peak_bytes()


def current_memory_bytes(device: torch.device | None = None) -> int:
    """Memory held now: of the process (resident), or of torch on `device` when that is a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device is not None and device.type == "mps":
        return torch.mps.current_allocated_memory()
    now = _status_bytes("VmRSS")
    return now if now is not None else _getrusage_peak_bytes()


def reset_peak_memory(device: torch.device | None = None) -> bool:
    """Start the peak anew at what is held now; False where the system cannot."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_memory_bytes(device: torch.device | None = None, *, root: Path = _SYSTEM_ROOT) -> int:
    """Memory that can still be taken: the machine's, or the control group's where that is less; the GPU's for a GPU.

    `root` is where /proc and /sys are looked for.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device is not None and device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    free = [_machine_available_bytes(root), *_cgroup_available_bytes(root)]
    return max(min(free), 0)


def physical_cores(root: Path = _SYSTEM_ROOT) -> int:
    """Physical cores this process may use by its affinity and its control group's quota; hyper-threads do not count."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: dict[int, tuple[str, str]] = {}
    for block in _read(root / "proc/cpuinfo").split("\n\n"):
        facts = _facts(block)
        if "processor" in facts and "core id" in facts:
            cores[int(facts["processor"])] = (facts.get("physical id", "0"), facts["core id"])
    number = len({cores.get(cpu, ("", str(cpu))) for cpu in usable}) or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        number = min(number, max(1, round(int(quota) / int(period))))
    return number


def cpu_flags(root: Path = _SYSTEM_ROOT) -> frozenset[str]:
    """The instruction-set flags of the first processor; empty where the system does not list them."""
    first = _read(root / "proc/cpuinfo").split("\n\n", 1)[0]
    return frozenset(_facts(first).get("flags", "").split())


def _pick_device(wanted: str) -> tuple[str, str]:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        name = next(name for name in ("cuda", "mps", "cpu") if present[name])
        return name, f"{_device_label(name)} (the fastest device here)" if name != "cpu" else "CPU (no GPU here)"
    if not present.get(wanted, False):
        here = ", ".join(name for name, is_here in present.items() if is_here)
        raise MachineError(f"device {wanted!r} is not here", field="device", expected=f"one of {here}")
    return wanted, f"{_device_label(wanted)} (asked for)"


def _device_label(name: str) -> str:
    return torch.cuda.get_device_name() if name == "cuda" else name.upper()


def _pick_dtype(device: torch.device, wanted: str) -> tuple[torch.dtype, str]:
    fast, why = _has_fast_bf16(device)
    if wanted == "auto":
        return (torch.bfloat16 if fast else torch.float32), f"{'bfloat16' if fast else 'float32'} ({why})"
    slow = wanted == "bfloat16" and not fast
    return DTYPES[wanted], f"{wanted} (asked for{'; slow here: ' + why if slow else ''})"


def _has_fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether `device` multiplies bfloat16 faster than float32, and the instruction set that says so."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor}"
    if device.type == "mps":
        return False, "float32 is the safe choice on MPS"
    found = [flag for flag in FAST_BF16_FLAGS if flag in cpu_flags()]
    if found and torch.backends.mkldnn.is_available():
        return True, f"the processor has {found[0]}"
    return False, "the processor has neither AMX nor AVX512-BF16"


def _pick_threads(wanted: int) -> tuple[int, str]:
    if wanted > 0:
        return wanted, f"{_threads(wanted)} (asked for)"
    environment = os.environ.get("OMP_NUM_THREADS", "")
    if environment.isdigit() and int(environment) > 0:
        return int(environment), f"{_threads(int(environment))} (OMP_NUM_THREADS)"
    cores = physical_cores()
    return cores, f"{_threads(cores)} (physical cores)"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _machine_available_bytes(root: Path) -> int:
    available = _facts(_read(root / "proc/meminfo")).get("MemAvailable", "").split()
    if available:
        return int(available[0]) * 1024
    names = os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available_bytes(root: Path) -> list[int]:
    """What each limiting control group of this process leaves; file cache can be given back, so it counts as free."""
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            base, limit_file, usage_file, cache = (
                root / "sys/fs/cgroup",
                "memory.max",
                "memory.current",
                "inactive_file",
            )
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit_file, usage_file, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        # in a container the path may not exist below the mount: the mount itself is then the group
        for group in [folder, *folder.parents]:
            limit, usage = _read(group / limit_file).strip(), _read(group / usage_file).strip()
            if limit.isdigit() and usage.isdigit():
                reclaimable = dict(row.split(" ", 1) for row in _read(group / "memory.stat").splitlines() if " " in row)
                left.append(int(limit) - int(usage) + int(reclaimable.get(cache, 0)))
            if group == base:
                break
    return left


def _status_bytes(name: str) -> int | None:
    value = _facts(_read(Path("/proc/self/status"))).get(name, "").split()
    return int(value[0]) * 1024 if value else None


def _getrusage_peak_bytes() -> int:
    import resource  # absent on Windows, as /proc is

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _facts(text: str) -> dict[str, str]:
    """``name : value`` lines as a mapping."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _read(path: Path) -> str:
    """The text of a system file; empty where the system has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
