"""Names, users and bytes of a bank (serving cases 5 to 8)."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.errors import AdapterError, AlpacaLoraError, MachineError, UserError
from alpaca_lora.inference import checked_adapter
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.banked_linear import BankedLinear
from alpaca_lora.models.decoder import CausalLM
from tests.inference.adapter_folders import (
    BASE,
    LABELS,
    assert_same,
    edit,
    ids,
    is_untouched,
    make_bank,
    make_folder,
    options,
    record,
    said_alone,
    said_together,
)
from tests.tiny import tiny_model


def banked(model: CausalLM) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BankedLinear)]


# --- the model


def test_the_base_is_itself_again(tmp_path: Path) -> None:
    model, bank = make_bank()
    modules = dict(model.named_modules())
    plain = said_together(bank, model, [(None, ids(6))])
    bank.load("p", make_folder(tmp_path / "p", "prefix"))
    assert banked(model) == []  # virtual tokens change no linear
    for kind in ("lora", "dora", "on-the-head"):
        bank.load(kind, make_folder(tmp_path / kind, kind))
    assert len(banked(model)) == 15
    assert torch.equal(said_together(bank, model, [(None, ids(6))])[0], plain[0])
    bank.unload("dora")
    assert banked(model) == [  # what the two others need
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj",
        "lm_head",
    ]  # fmt: skip
    for kind in ("lora", "on-the-head", "p"):
        bank.unload(kind)
    assert is_untouched(model, bank) and dict(model.named_modules()) == modules
    assert torch.equal(said_together(bank, model, [(None, ids(6))])[0], plain[0])


def test_a_model_with_an_adapter_of_its_own_has_no_bank() -> None:
    model = tiny_model()
    Lora.attach(model, options(), seed=0)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        AdapterBank(model, BASE)


def test_num_bytes_is_what_the_tensors_take(tmp_path: Path) -> None:
    _, bank = make_bank()
    for kind in ("lora", "dora", "adalora", "prefix", "prompt"):
        labels = LABELS if kind == "lora" else []
        adapter = bank.load(kind, make_folder(tmp_path / kind, kind, labels=labels))
        held = [
            t for low in adapter.updates.values() for t in (low.A_RD, low.B_OR, low.magnitude_O, low.inverse_norm_O)
        ]
        held += [t for pair in adapter.prefix or () for t in pair]
        held += [adapter.score.weight] if adapter.score is not None else []
        assert adapter.num_bytes == sum(t.numel() * t.element_size() for t in held if t is not None), kind
    assert bank.num_bytes == sum(bank.get(name).num_bytes for name in bank.names())


# --- names (case 5)


@pytest.mark.parametrize(
    "name",
    [
        "", "../x", "/etc", "a/b", "a\\b", "a\0", "%2e%2e", "a b", "-a", ".a", "a\n", "ä", "а", "a" * 65, "x" * 10_000,
        "tiny", "TINY",
    ],
)  # fmt: skip
def test_bad_names(tmp_path: Path, name: str) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    with pytest.raises(AdapterError, match="name") as caught:
        bank.load(name, folder)
    assert len(str(caught.value)) < 500 and is_untouched(model, bank)
    bank.load("A1.b-c_" + "x" * 57, folder)


def test_unknown_names(tmp_path: Path) -> None:
    _, bank = make_bank()
    bank.load("demo", make_folder(tmp_path / "a"))
    for ask in (bank.get, bank.acquire, bank.unload):
        with pytest.raises(AdapterError, match="no adapter 'demos' is loaded, did you mean 'demo'"):
            ask("demos")
        with pytest.raises(AdapterError, match="no adapter 'xxx"):
            ask("x" * 10_000)


# --- digests (case 6)


def test_the_digest_is_of_what_changes_outputs(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    first = bank.load("a", folder).digest
    assert bank.load("b", shutil.copytree(folder, tmp_path / "b")).digest == first
    assert bank.load("c", make_folder(tmp_path / "c", seed=1)).digest != first
    edit(folder, lora_alpha=9)
    assert bank.load("d", folder).digest != first
    edit(folder, lora_alpha=8, lora_dropout=0.5, alpha_pattern={"nothing_here": 3})
    assert bank.load("e", folder).digest == first
    assert AdapterBank(tiny_model(), "another base").load("a", _without_record(folder)).digest != first


def _without_record(folder: Path) -> Path:
    (folder / "alpaca_lora.json").unlink()
    return folder


def test_a_reload_under_the_same_name(tmp_path: Path) -> None:
    model, bank = make_bank()
    a, b = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", "lora-everywhere", seed=1)
    alone = [said_alone(folder, [ids(6)])[0] for folder in (a, b)]
    bank.load("x", a)
    old = bank.acquire("x")
    bank.load("x", b)
    new = bank.acquire("x")
    assert bank.names() == ["x"] and old.digest != new.digest and bank.num_bytes == old.num_bytes + new.num_bytes
    for found, expected in zip(said_together(bank, model, [(old, ids(6)), (new, ids(6))]), alone, strict=True):
        assert_same(found, expected)
    bank.release(old)
    assert not old.is_resident and bank.num_bytes == new.num_bytes
    again = bank.load("x", a)  # A, B, A
    assert again.digest == old.digest
    assert_same(said_together(bank, model, [(again, ids(6))])[0], alone[0])
    bank.release(new)
    bank.unload("x")
    assert is_untouched(model, bank)


def test_a_failed_reload_leaves_the_adapter_that_was_there(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    adapter = bank.load("a", folder)
    edit(folder, r=0)
    with pytest.raises(AdapterError):
        bank.load("a", folder)
    assert bank.acquire("a") is adapter and adapter.is_resident


# --- users and bytes


def test_unload_in_use(tmp_path: Path) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    bank.load("a", folder)
    adapter = bank.acquire("a")
    assert bank.acquire("a") is adapter
    bank.unload("a")
    assert bank.names() == []
    with pytest.raises(AdapterError, match="no adapter"):
        bank.acquire("a")
    bank.release(adapter)
    assert_same(said_together(bank, model, [(adapter, ids(6))])[0], said_alone(folder, [ids(6)])[0])
    bank.release(adapter)
    assert is_untouched(model, bank) and not adapter.is_resident
    with pytest.raises(ValueError, match="not in use"):
        bank.release(adapter)


def test_memory_goes_with_the_last_user(tmp_path: Path) -> None:
    model, bank = make_bank()
    bank.load("a", make_folder(tmp_path / "a"))
    adapter = bank.acquire("a")
    said_together(bank, model, [(adapter, ids(3))])
    watched = [weakref.ref(tensor) for low in adapter.updates.values() for tensor in (low.A_RD, low.B_OR)]
    bank.unload("a")
    assert all(one() is not None for one in watched)
    bank.release(adapter)
    gc.collect()
    assert all(one() is None for one in watched)


def test_the_least_recently_used_leaves_and_comes_back(tmp_path: Path) -> None:
    model, bank = make_bank()
    folders = {name: make_folder(tmp_path / name, seed=at) for at, name in enumerate("abcd")}
    size = bank.load("a", folders["a"]).num_bytes
    bank.max_bytes = 3 * size
    bank.load("b", folders["b"])
    bank.load("c", folders["c"])
    bank.release(bank.acquire("a"))
    bank.load("d", folders["d"])

    def resident() -> str:
        return "".join(name for name in bank.names() if bank.get(name).is_resident)

    assert bank.names() == ["a", "b", "c", "d"] and resident() == "acd" and bank.num_bytes == 3 * size
    before = bank.get("b")
    assert before.record is not None and before.updates == {}
    back = bank.acquire("b")
    assert back.digest == before.digest and resident() == "abd"
    expected = said_alone(folders["b"], [ids(5)])[0]
    assert_same(said_together(bank, model, [(back, ids(5))])[0], expected)
    # in use, it stays; what its folder holds by then is another adapter
    bank.release(bank.acquire("a"))
    bank.acquire("d")
    bank.acquire("c")
    assert resident() == "bcd"
    with pytest.raises(MachineError, match="in use or pinned"):
        bank.acquire("a")
    bank.release(back)
    shutil.rmtree(folders["a"])
    make_folder(folders["a"], seed=9)
    digest = bank.get("a").digest
    assert bank.acquire("a").digest != digest and resident() == "acd"


def test_pinned_adapters_stay_and_large_ones_are_refused(tmp_path: Path) -> None:
    model, bank = make_bank()
    size = bank.load("a", make_folder(tmp_path / "a"), pinned=True).num_bytes
    bank.max_bytes = size + size // 2
    with pytest.raises(MachineError, match="in use or pinned"):
        bank.load("b", make_folder(tmp_path / "b"))
    with pytest.raises(AdapterError, match=rf"takes \d+ bytes of memory, expected at most the {bank.max_bytes} bytes"):
        bank.load("c", make_folder(tmp_path / "c", "lora-everywhere"))
    assert bank.names() == ["a"] and bank.get("a").is_resident
    bank.unload("a")
    assert is_untouched(model, bank)


def test_an_evicted_adapter_whose_folder_is_gone(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    bank.max_bytes = bank.load("a", folder).num_bytes
    bank.load("b", make_folder(tmp_path / "b"))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        bank.acquire("a")
    assert bank.get("b").is_resident  # nothing had to leave for it
    bank.unload("a")
    assert bank.names() == ["b"]


# --- threads (case 8)


def in_threads(count: int, work: Callable[[int], object]) -> list[BaseException]:
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(at: int) -> None:
        try:
            barrier.wait()
            work(at)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_a_hundred_loads_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank = make_bank()
    folder, reads, real = make_folder(tmp_path / "a"), [], checked_adapter.read_tensors

    def slow(*args: Any) -> dict[str, torch.Tensor]:
        reads.append(args)
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(checked_adapter, "read_tensors", slow)
    found: list[Any] = []
    assert in_threads(100, lambda _: found.append(bank.load("a", folder))) == []
    assert len(reads) == 1 and len({id(one) for one in found}) == 1 and len(found) == 100
    # a later call looks again: the files may be others by now
    bank.load("a", folder)
    assert len(reads) == 2
    # those who wait for an adapter that left, too
    bank.max_bytes = bank.get("a").num_bytes
    bank.load("b", make_folder(tmp_path / "b"))
    reads.clear()
    assert in_threads(20, lambda _: bank.acquire("a")) == [] and len(reads) == 1
    for _ in range(20):
        bank.release(bank.get("a"))
    with pytest.raises(ValueError, match="not in use"):
        bank.release(bank.get("a"))


def test_unload_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = make_bank()
    folder, reading, real = make_folder(tmp_path / "a"), threading.Event(), checked_adapter.read_tensors

    def slow(*args: Any) -> dict[str, torch.Tensor]:
        reading.set()
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(checked_adapter, "read_tensors", slow)
    thread = threading.Thread(target=bank.load, args=("a", folder))
    thread.start()
    reading.wait()
    bank.unload("a")  # waits, then takes it away
    thread.join()
    assert is_untouched(model, bank)


def test_loads_and_unloads_beside_forwards(tmp_path: Path) -> None:
    model, bank = make_bank()
    kinds = ("lora", "dora", "prompt", "lora-everywhere")
    folders = {kind: make_folder(tmp_path / kind, kind, seed=at) for at, kind in enumerate(kinds)}
    expected = {kind: said_alone(folders[kind], [ids(4)])[0] for kind in kinds}
    # room for what is in use while it is read again, not for all that ever was
    bank.max_bytes = 3 * sum(bank.load(kind, folders[kind]).num_bytes for kind in kinds)
    stop = time.monotonic() + 3
    counts = {"forward": 0, "load": 0}

    def forward() -> None:
        held = [bank.acquire(kind) for kind in kinds[:3]]
        found = said_together(bank, model, [(one, ids(4)) for one in held])
        for one, logits in zip(held, found, strict=True):
            assert_same(logits, expected[one.name])
            bank.release(one)
        counts["forward"] += 1

    def work(at: int) -> None:
        while time.monotonic() < stop:
            if at == 0:
                forward()
                continue
            if at == 3:
                bank.unload(kinds[at])
            bank.load(kinds[at], folders[kinds[at]])
            counts["load"] += 1

    assert in_threads(4, work) == [] and counts["forward"] > 5 and counts["load"] > 5
    for name in bank.names():
        bank.unload(name)
    assert is_untouched(model, bank)


def test_failed_loads_leave_nothing(tmp_path: Path) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    edit(folder, r=0)
    errors = in_threads(50, lambda at: bank.load(f"name{at % 5}", folder))
    assert len(errors) == 50 and all(isinstance(error, AlpacaLoraError) for error in errors)
    assert is_untouched(model, bank) and bank._turns == {} and bank._reserved == 0


def test_records_travel(tmp_path: Path) -> None:
    _, bank = make_bank()
    note = record(template={"name": "alpaca"}, stop_ids=[257], labels=[])
    found = bank.load("a", make_folder(tmp_path / "a", note=note)).record
    assert found is not None and dataclasses.replace(found, adapter_sha256="") == note
