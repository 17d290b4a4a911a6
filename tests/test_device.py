"""Device, dtype, threads and memory: chosen by what the machine says, with the reason told."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from alpaca_lora import device
from alpaca_lora.errors import MachineError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_large_tensors_give_their_memory_back():
    if not device.give_freed_memory_back():
        pytest.skip("the C library is not glibc")
    code = """
import torch
from alpaca_lora import device
MIB = 2**20
assert device.give_freed_memory_back()
before = device.current_memory_bytes()
kept = []
for _ in range(8):  # small ones in between keep a heap from shrinking
    large = torch.ones(12 * MIB, dtype=torch.uint8)
    kept.append(torch.ones(MIB // 16, dtype=torch.uint8))
    del large
held = [torch.ones(12 * MIB, dtype=torch.uint8) for _ in range(8)]
grown = device.current_memory_bytes() - before
del held
print(grown, device.current_memory_bytes() - before)
"""  # a process of its own: what other tests leave behind goes at any time
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, left = map(int, done.stdout.split())
    assert grown > 90 * MIB and left < 8 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    assert not device.give_freed_memory_back()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpuinfo(*cores: tuple[int, int], flags: str = "fpu avx2") -> str:
    return "\n".join(
        f"processor\t: {cpu}\nphysical id\t: {socket}\ncore id\t\t: {core}\nflags\t\t: {flags}\n"
        for cpu, (socket, core) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("flags", "dtype", "words"),
    [
        (frozenset({"avx512_bf16"}), torch.bfloat16, "bfloat16 (the processor has avx512_bf16)"),
        (frozenset({"amx_bf16", "avx512_bf16"}), torch.bfloat16, "bfloat16 (the processor has amx_bf16)"),
        (frozenset({"avx512f", "avx2"}), torch.float32, "float32 (the processor has neither AMX nor AVX512-BF16)"),
    ],
)
def test_the_dtype_follows_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], dtype: torch.dtype, words: str
) -> None:
    monkeypatch.setattr(device, "cpu_flags", lambda: flags)
    compute = device.pick_compute("cpu", "auto", 1)
    assert compute.dtype == dtype
    assert words in compute.reason


def test_what_is_asked_for_is_done_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    compute = device.pick_compute("cpu", "float32", 1)
    assert (compute.device, compute.dtype, compute.dtype_name) == (torch.device("cpu"), torch.float32, "float32")
    assert compute.reason == "CPU (asked for); float32 (asked for); 1 thread (asked for)"
    monkeypatch.setattr(device, "cpu_flags", frozenset)
    assert "bfloat16 (asked for; slow here" in device.pick_compute("cpu", "bfloat16", 1).reason


def test_threads_are_set_by_the_key_the_environment_or_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.pick_compute("cpu", "float32", 2).num_threads == 2 == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.pick_compute("cpu", "float32", 0).num_threads == 1 == torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert device.pick_compute("cpu", "float32", 0).num_threads == device.physical_cores() == torch.get_num_threads()


def test_scratch_is_the_same_room_in_a_thread_and_another_in_each() -> None:
    with torch.inference_mode():
        first = device.scratch((4, 6), torch.bfloat16)
    assert not first.is_inference()  # a training step may follow in the same thread
    assert device.scratch((3, 5), torch.bfloat16).data_ptr() == first.data_ptr()
    assert device.scratch((3, 5), torch.float32).data_ptr() != first.data_ptr()
    assert device.scratch((64, 64), torch.bfloat16).shape == (64, 64)
    pointers: list[int] = []
    thread = threading.Thread(target=lambda: pointers.append(device.scratch((2, 2), torch.bfloat16).data_ptr()))
    thread.start()
    thread.join()
    assert pointers != [device.scratch((2, 2), torch.bfloat16).data_ptr()]


def test_denormals_are_flushed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    torch.set_flush_denormal(False)
    assert float(torch.tensor(1e-39) * 1) > 0
    device.pick_compute("cpu", "float32", 1)
    assert float(torch.tensor(1e-39) * 1) == 0


def test_a_device_that_is_not_here_is_refused() -> None:
    absent = [name for name in ("cuda", "mps") if not getattr(torch, name).is_available()]
    for name in [*absent, "tpu"]:
        with pytest.raises(MachineError, match=f"device: device '{name}' is not here, expected one of .*cpu"):
            device.pick_compute(name)


@pytest.mark.gpu
def test_a_gpu_is_taken_when_there_is_one() -> None:
    compute = device.pick_compute()
    assert compute.device.type == "cuda"
    assert device.available_memory_bytes(compute.device) > MIB
    before = device.current_memory_bytes(compute.device)
    held = torch.ones(MIB, device=compute.device)
    assert device.current_memory_bytes(compute.device) >= before + held.nbytes
    assert device.peak_memory_bytes(compute.device) >= before + held.nbytes


def test_physical_cores_do_not_count_hyper_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    root = write(tmp_path, {"proc/cpuinfo": cpuinfo(*[(s, c) for s in (0, 1) for c in (0, 1)] * 2)})
    assert device.physical_cores(root) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4})  # the two threads of one core
    assert device.physical_cores(root) == 1


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("max 100000", 4), ("10000 100000", 1)])
def test_physical_cores_keep_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    files = {"proc/cpuinfo": cpuinfo((0, 0), (0, 1), (0, 2), (0, 3)), "sys/fs/cgroup/cpu.max": quota}
    assert device.physical_cores(write(tmp_path, files)) == cores


def test_without_proc_each_processor_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert device.physical_cores(tmp_path) == 3
    assert device.cpu_flags(tmp_path) == frozenset()


def test_cpu_flags(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": cpuinfo((0, 0), (0, 1), flags="fpu amx_bf16")})
    assert device.cpu_flags(root) == {"fpu", "amx_bf16"}


MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1000 kB\nMemAvailable:    8388608 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8192 * MIB),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1\n",
                "sys/fs/cgroup/a/memory.max": f"{2048 * MIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{1536 * MIB}\n",
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {512 * MIB}\n",
            },
            1024 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/not/mounted/here\n",
                "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
                "sys/fs/cgroup/memory.current": f"{500 * MIB}\n",
            },
            12 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu:/x\n4:memory,pids:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{256 * MIB}\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{300 * MIB}\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{64 << 30}\n",
                "sys/fs/cgroup/memory.current": "0\n",
            },
            8192 * MIB,
        ),
    ],
    ids=["no group", "group above", "container", "version 1, over its limit", "group larger than the machine"],
)
def test_available_memory_is_the_least_of_machine_and_groups(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    assert device.available_memory_bytes(root=write(tmp_path, {"proc/meminfo": MEMINFO, **files})) == available


def test_available_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < device.available_memory_bytes() < total
    assert 0 < device.available_memory_bytes(root=Path("/none/such")) <= total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process() -> None:
    """In a process of its own: what the test runner frees meanwhile is not ours."""
    code = f"""
import numpy as np
from alpaca_lora import device
assert device.reset_peak_memory()
before = device.current_memory_bytes()
held = np.ones(64 * {MIB}, dtype=np.uint8)
assert device.current_memory_bytes() >= before + 60 * {MIB}
del held
assert device.peak_memory_bytes() >= before + 60 * {MIB}
assert device.current_memory_bytes() < before + 30 * {MIB}
device.reset_peak_memory()
assert device.peak_memory_bytes() < before + 30 * {MIB}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_does_not_start_with_its_parents_peak() -> None:
    held = np.ones(400 * MIB, dtype=np.uint8)
    code = "from alpaca_lora.device import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes


def test_the_seed_fixes_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        device.seed_everything(2**31 + 5)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
    first = draw()
    device.seed_everything(7)
    assert first != (random.random(), float(np.random.rand()), float(torch.rand(())))
