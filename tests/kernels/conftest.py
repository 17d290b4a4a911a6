"""Ops in C as they are made for several kinds of processors."""

from __future__ import annotations

import pytest

from alpaca_lora.kernels.cpu import library as library_module
from alpaca_lora.kernels.cpu.library import FLAGS, Library, library


@pytest.fixture(params=["", "-march=haswell", "-march=x86-64"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library for this processor, for one with AVX2 only, and for one with neither, in the modules of `USED_BY`."""
    if not request.param:
        found = library()
        if found.handle is None:
            pytest.skip(found.reason)
        return found
    compiler = library_module.find_compiler()
    if compiler is None or library_module.platform.machine() != "x86_64":
        pytest.skip("needs a C compiler and a processor of this kind")
    found = Library(library_module.load(compiler, (*FLAGS, request.param)), request.param)
    for module in request.module.USED_BY:
        monkeypatch.setattr(module, "library", lambda: found)
    return found
