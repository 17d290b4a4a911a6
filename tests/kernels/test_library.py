"""The library of ops in C: what it is made of, where it is kept, and what happens without it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from alpaca_lora.kernels.cpu import library as module
from alpaca_lora.kernels.cpu.library import FLAGS, Library, compiled, find_compiler, library, load

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and a process that has not asked yet."""
    monkeypatch.setenv("ALPACA_LORA_HOME", str(tmp_path))
    monkeypatch.delenv("ALPACA_LORA_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    library.cache_clear()
    yield tmp_path / "kernels"
    library.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_compiled_once_and_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    assert found.handle is not None and found.reason.startswith("compiled by ")
    files = list(own_cache.iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"
    library.cache_clear()
    run = subprocess.run

    def asks_only(command: list[str], **others: object) -> object:
        assert command[-1] == "--version", "compiled again"
        return run(command, **others)  # pyright: ignore

    monkeypatch.setattr(subprocess, "run", asks_only)
    assert library().handle is not None and list(own_cache.iterdir()) == files


@needs_compiler
def test_other_flags_source_or_processor_make_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    assert compiler is not None
    paths = {compiled(compiler, FLAGS), compiled(compiler, (*FLAGS, "-O1"))}
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"another"}))
    paths.add(compiled(compiler, FLAGS))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "library.py"))
    for number, name in enumerate((*module.SOURCES, *module.HEADERS)):
        (tmp_path / name).write_text(f"extern int nothing{number};")
    for name in ("", *module.SOURCES, *module.HEADERS):
        if name:
            (tmp_path / name).write_text("extern int another;")
        paths.add(compiled(compiler, FLAGS))
    assert len(paths) == 4 + len(module.SOURCES) + len(module.HEADERS)


@needs_compiler
def test_several_at_once_make_one_whole_file(own_cache: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: compiled(compiler, FLAGS), range(3)))
    assert len(paths) == 1 and list(own_cache.iterdir()) == list(paths)
    assert ctypes.CDLL(str(paths.pop())).decode_four_bit


@needs_compiler
def test_a_damaged_file_is_made_again() -> None:
    compiler = find_compiler()
    assert compiler is not None
    path = compiled(compiler, FLAGS)
    path.write_bytes(b"not a library")
    assert load(compiler, FLAGS).decode_four_bit


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_it_can_be_switched_off(own_cache: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("ALPACA_LORA_KERNELS", word)
    assert library() == Library(None, "plain torch (ALPACA_LORA_KERNELS is off)")
    assert not own_cache.exists()


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library() == Library(None, "plain torch (no C compiler here)")
    monkeypatch.setenv("CC", "/not/here/cc")
    assert library() == Library(None, "plain torch (no C compiler here)")


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[ "$1" = --version ] && exit 0; echo "no such option" >&2; exit 1'
    monkeypatch.setenv("CC", script(tmp_path / "mycc", text))
    assert library() == Library(None, "plain torch (mycc: no such option)")
    library.cache_clear()
    monkeypatch.setenv("CC", script(tmp_path / "silent", "exit 3"))
    found = library()
    assert found.handle is None and found.reason.startswith("plain torch (silent: ")


@needs_compiler
def test_a_compiler_that_does_not_know_the_first_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("cc") or shutil.which("gcc")
    text = f'for a in "$@"; do case $a in -m*) echo "unknown $a" >&2; exit 1;; esac; done; exec {real} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "plain", text))
    found = library()
    assert found.handle is not None and found.reason == "compiled by plain"


@needs_compiler
def test_the_compilers_command_may_have_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc')} -DNOTHING=1")
    assert find_compiler() == [shutil.which("cc"), "-DNOTHING=1"] and library().handle is not None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ALPACA_LORA_HOME", str(blocked))
    found = library()
    assert found.handle is None and found.reason.startswith("plain torch (")


PROGRAM = """
import sys, torch
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.kernels.cpu.library import library
weight = torch.randn(130, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
x = torch.randn(9, 576, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
scheme = NF4()
parts = scheme.quantize(weight, name="w")
y = scheme.apply(x, parts, (130, 576))
y.sum().backward()
torch.save({"parts": parts, "y": y.detach(), "dx": x.grad, "in_c": library().handle is not None}, sys.argv[1])
"""


@needs_compiler
def test_a_process_computes_the_same_bits_with_and_without(tmp_path: Path) -> None:
    results = []
    for word in ("on", "off"):
        file = tmp_path / f"{word}.pt"
        environment = {**os.environ, "ALPACA_LORA_KERNELS": word, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", PROGRAM, str(file)], check=True, env=environment, timeout=120)
        results.append(torch.load(file, weights_only=True))
    on, off = results
    assert on["in_c"] and not off["in_c"]
    assert torch.equal(on["y"], off["y"]) and torch.equal(on["dx"], off["dx"])
    assert all(torch.equal(on["parts"][name], off["parts"][name]) for name in on["parts"])
