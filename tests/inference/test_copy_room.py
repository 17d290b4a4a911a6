"""The copies that a step makes of its adapters are in the bank's budget, and give way to adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import MachineError
from alpaca_lora.inference import banked_linear
from alpaca_lora.inference.adapter_bank import IDLE_FOR, AdapterBank
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.models.decoder import CausalLM
from tests.inference.adapter_folders import assert_same, ids, make_bank, make_folder, said_alone, said_together


@pytest.fixture(autouse=True)
def no_direct_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows need no copies where there is a compiler."""
    monkeypatch.setattr(banked_linear, "is_ready", lambda device: False)


@pytest.fixture(autouse=True)
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without a compiler, or elsewhere: few rows are not computed in one call."""
    monkeypatch.setattr(banked_linear, "is_ready", lambda device: False, raising=False)


def copies(bank: AdapterBank) -> int:
    """Bytes of this thread's copies, counted tensor by tensor."""
    found = [group for group in bank._rows.stack.groups.values() if group is not None]
    return sum(t.numel() * t.element_size() for group in found for t in (group.A_SDR, *group.B))


def folders(tmp_path: Path, names: str) -> dict[str, Path]:
    return {name: make_folder(tmp_path / name, seed=at) for at, name in enumerate(names)}


def check(model: CausalLM, bank: AdapterBank, adapters: Sequence[LoadedAdapter], alone: Sequence[torch.Tensor]) -> None:
    """One forward of all says what each says alone, and all together are in the budget."""
    found = said_together(bank, model, [(adapter, ids(4)) for adapter in adapters])
    for one, expected in zip(found, alone, strict=True):
        assert_same(one, expected)
    assert bank.max_bytes is None or bank.num_bytes + copies(bank) <= bank.max_bytes
    assert bank.num_copy_bytes == copies(bank)


def test_copies_take_what_is_left(tmp_path: Path) -> None:
    model, bank = make_bank()
    a = folders(tmp_path, "a")["a"]
    alone = [said_alone(a, [ids(4)])[0]]
    size = bank.load("a", a).num_bytes
    adapter = bank.acquire("a")
    check(model, bank, [adapter], alone)
    assert copies(bank) == size  # the tiny model is float32 too
    for max_bytes, expected in ((2 * size, size), (size, 0), (2 * size - 1, None)):
        model, bank = make_bank(max_bytes=max_bytes)
        bank.load("a", a)
        check(model, bank, [bank.acquire("a")], alone)
        assert copies(bank) == expected or (expected is None and 0 < copies(bank) < size)  # of some linears


def test_an_adapter_that_nobody_has_used_for_long_leaves_for_copies(tmp_path: Path) -> None:
    model, bank = make_bank()
    found = folders(tmp_path, "abc")
    size = max(bank.load(name, folder).num_bytes for name, folder in found.items())
    bank.max_bytes = 3 * size
    alone = [said_alone(found["a"], [ids(4)])[0]]
    held = [bank.acquire("a")]
    check(model, bank, held, alone)
    # the others were asked for a moment ago: to read one again would cost more than these copies bring
    assert copies(bank) == 0 and [bank.get(name).is_resident for name in "abc"] == [True, True, True]
    for _ in range(IDLE_FOR):
        bank.release(bank.acquire("a"))
    held += [bank.acquire("c")]  # other adapters in the step: it is tried again
    check(model, bank, held, [*alone, said_alone(found["c"], [ids(4)])[0]])
    assert 0 < copies(bank) <= size and [bank.get(name).is_resident for name in "abc"] == [True, False, True]


def test_copies_leave_for_an_adapter_that_is_asked_for(tmp_path: Path) -> None:
    model, bank = make_bank()
    found = folders(tmp_path, "abc")
    alone = [said_alone(folder, [ids(4)])[0] for folder in found.values()]
    size = bank.load("a", found["a"]).num_bytes
    bank.max_bytes = 2 * size
    held = [bank.acquire("a")]
    check(model, bank, held, alone[:1])
    assert copies(bank) == size
    bank.load("b", found["b"])
    assert copies(bank) == 0
    held.append(bank.acquire("b"))
    check(model, bank, held, alone[:2])
    assert copies(bank) == 0
    with pytest.raises(MachineError, match=f"{size} bytes are missing"):
        bank.load("c", found["c"])
    bank.release(held.pop())
    bank.unload("b")
    check(model, bank, held, alone[:1])
    assert copies(bank) == size


def test_never_more_than_the_budget_whoever_loads(tmp_path: Path) -> None:
    model, bank = make_bank()
    found = folders(tmp_path, "abcd")
    alone = [said_alone(folder, [ids(4)])[0] for folder in found.values()]
    bank.max_bytes = 5 * max(bank.load(name, folder).num_bytes for name, folder in found.items()) + 100
    stop, problems = time.monotonic() + 2, []

    def watch() -> None:
        while time.monotonic() < stop:
            with bank._lock:
                if bank._missing(0) > 0:
                    problems.append(bank._missing(0))

    def load() -> None:
        while time.monotonic() < stop:
            for name in "cd":
                bank.load(name, found[name])

    threads = [threading.Thread(target=work) for work in (watch, load)]
    for thread in threads:
        thread.start()
    num_forwards = 0
    while time.monotonic() < stop:
        held = [bank.acquire(name) for name in "ab"]
        check(model, bank, held, alone[:2])
        for adapter in held:
            bank.release(adapter)
        num_forwards += 1
    for thread in threads:
        thread.join()
    assert problems == [] and num_forwards > 1
