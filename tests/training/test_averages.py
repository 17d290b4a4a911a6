"""AdamW's averages in memory, in 8 bits and on a disk. Oracles: torch.optim.AdamW, bitsandbytes' AdamW8bit."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.base import Kept
from alpaca_lora.device import current_memory_bytes
from alpaca_lora.errors import MachineError, ModelFileError
from alpaca_lora.training.averages import BLOCK, KINDS, InEightBits, InMemory, OnDisk
from alpaca_lora.training.checkpoint import verify
from alpaca_lora.training.optimizer import FlatAdamW
from tests.training.test_optimizer import give_gradients, parameters
from tests.training.tiny_run import digest, log_in, tiny_trainer

CPU = torch.device("cpu")
ODD = (1, 257, 256, 3 * 256 + 17)  # lengths of parts, each beginning at a whole block


def places() -> list[slice]:
    starts, at = [], 0
    for length in ODD:
        starts.append(slice(at, at + length))
        at += -(-length // BLOCK) * BLOCK
    return starts


def values(part: slice, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + part.start)
    mean = torch.randn(part.stop - part.start, generator=generator)
    return mean, torch.randn(mean.shape, generator=generator).square()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_come_back(kind: str, tmp_path: Path) -> None:
    averages = KINDS[kind](2048, CPU, tmp_path)
    parts = places()
    for part in parts:
        assert not any(bool(one.any()) for one in averages.read(part))  # zero at first
        averages.write(part, *values(part))
    for part in parts:
        for found, wanted in zip(averages.read(part), values(part), strict=True):
            if kind == "int8":
                # of the block's largest: half the widest gap of the map is 0.9 / 64 / 2, or / 128 / 2 without a sign
                assert (found - wanted).abs().max() <= 0.9 / 64 / 2 * wanted.abs().max() * (1 + 1e-5)
            else:
                assert torch.equal(found, wanted)
    assert averages.empty(512).read(slice(0, 512))[0].any() == torch.tensor(False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_into_a_checkpoint_says_it_all(kind: str, tmp_path: Path) -> None:
    one, other = (KINDS[kind](2048, CPU, tmp_path) for _ in range(2))
    for part in places():
        one.write(part, *values(part))
        shape = torch.Size((part.stop - part.start,))
        for name, tensor in one.tensors(part, shape).items():
            other.tensors(part, shape)[name].copy_(tensor.clone())
        assert all(torch.equal(a, b) for a, b in zip(one.read(part), other.read(part), strict=True))


def test_bytes_of_each_number() -> None:
    averages = InEightBits(2**16, CPU, None)
    held = sum(t.numel() * t.element_size() for t in (*averages.codes, *averages.scales))
    assert held / 2**16 == 2 + 2 * 4 / 256


def test_a_square_is_never_rounded_to_zero() -> None:
    averages = InEightBits(BLOCK, CPU, None)
    square = torch.full((BLOCK,), 1e-12)
    square[0], square[1] = 1.0, 0.0
    averages.write(slice(0, BLOCK), torch.zeros(BLOCK), square)
    found = averages.read(slice(0, BLOCK))[1]
    assert found[0] == 1 and found[1] == 0
    assert bool((found[2:] > 0).all()) and float(found[2:].max()) < 1e-6


def test_the_disk_gives_its_memory_back(tmp_path: Path) -> None:
    count = 2**24
    averages = OnDisk(count, CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []  # a file without a name: nothing to clean up, whatever happens
    before = current_memory_bytes()
    for start in range(0, count, 2**20):
        part = slice(start, start + 2**20)
        mean, square = averages.read(part)
        mean.add_(1)
        square.add_(2)
        averages.write(part, mean, square)
    assert current_memory_bytes() - before < 32 * 2**20  # of 128 MiB
    for found, wanted in zip(averages.tensors(slice(0, count), torch.Size((count,))).values(), (1, 2), strict=True):
        assert bool((found == wanted).all())
    assert current_memory_bytes() - before > 96 * 2**20  # looked at, and there
    averages.release()
    assert current_memory_bytes() - before < 32 * 2**20


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"optimizer_state: cannot hold .*No space left.*8,192 bytes are needed"):
        OnDisk(1024, CPU, tmp_path)


# ---- in the optimizer


def trajectory(optimizer: Any, named: list[tuple[str, nn.Parameter]], steps: int = 60) -> torch.Tensor:
    for step in range(steps):
        optimizer.zero_grad()
        give_gradients(named, step % 7)
        if isinstance(optimizer, FlatAdamW):
            optimizer.step(0.01)
        else:
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for _, p in named])


def test_on_disk_it_is_the_same_numbers(tmp_path: Path) -> None:
    ours, theirs = parameters(), parameters()
    flat, disk = (
        FlatAdamW(ours, weight_decay=0.1),
        FlatAdamW(theirs, weight_decay=0.1, averages="disk", folder=tmp_path),
    )
    assert torch.equal(trajectory(flat, ours), trajectory(disk, theirs))
    assert isinstance(flat._averages, InMemory) and isinstance(disk._averages, OnDisk)


@pytest.fixture(scope="module")
def adamw8bit() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes.optim.AdamW8bit


def test_in_8_bits_it_stays_near_float32_and_bitsandbytes_does_no_better(adamw8bit: Any) -> None:
    start = torch.cat([p.detach().reshape(-1) for _, p in parameters()])
    exact, ours, theirs = parameters(), parameters(), parameters()
    wanted = trajectory(torch.optim.AdamW([p for _, p in exact], lr=0.01, weight_decay=0.0), exact)
    found = trajectory(FlatAdamW(ours, averages="int8"), ours)
    moved = float((wanted - start).norm())
    assert float((found - wanted).norm()) < 0.05 * moved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = adamw8bit([p for _, p in theirs], lr=0.01, weight_decay=0.0, min_8bit_size=1)
        try:
            other = trajectory(peer, theirs)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            pytest.skip(f"bitsandbytes has no 8 bit optimizer on this device: {error}")
    assert float((other - wanted).norm()) < 0.05 * moved
    assert float((found - other).norm()) < 0.05 * moved


@pytest.mark.parametrize("kind", ["int8", "disk"])
def test_parameters_shrink_with_their_averages(kind: Any, tmp_path: Path) -> None:
    ours, twins = parameters(), parameters()
    flat, exact = FlatAdamW(ours, averages=kind, folder=tmp_path), FlatAdamW(twins)
    for optimizer, named in ((flat, ours), (exact, twins)):
        trajectory(optimizer, named, steps=3)
        optimizer.select({"p3": Kept(0, torch.tensor([1, 5, 40])), "p2": Kept(1, torch.tensor([1]))})
        assert tuple(named[3][1].shape) == (3, 8) and tuple(named[2][1].shape) == (17, 1)
        optimizer.zero_grad()
        give_gradients(named, 9)
        optimizer.step(0.01)
    for (_, one), (_, two) in zip(ours, twins, strict=True):
        assert (one - two).abs().max() <= (0 if kind == "disk" else 0.005)


def test_averages_of_another_kind_are_refused() -> None:
    flat, eight = FlatAdamW(parameters()), FlatAdamW(parameters(), averages="int8")
    with pytest.raises(ModelFileError, match=r"exp_avg_scales\.p0 is missing"):
        eight.load_state(flat.state_tensors(), updates=1, file="f")
    with pytest.raises(ModelFileError, match=r"exp_avg_scales\.p0 is unknown"):
        flat.load_state(eight.state_tensors(), updates=1, file="f")
    mixed = {**eight.state_tensors(), "exp_avg.p0": flat.state_tensors()["exp_avg.p0"]}
    with pytest.raises(ModelFileError, match=r"exp_avg\.p0 is torch\.float32, not torch\.uint8"):
        eight.load_state(mixed, updates=1, file="f")


# ---- in a run

ADALORA = {"method": "adalora", "adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 1}


@pytest.mark.parametrize("adapter", [{}, ADALORA, {"method": "full"}], ids=["lora", "adalora", "full"])
@pytest.mark.parametrize("state", ["int8", "disk"])
def test_resumed_is_uninterrupted_from_every_step(state: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "adapter": adapter, "optimizer_state": state, "max_steps": 4, "save_steps": 1, "save_total_limit": 9
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (1, 2, 3):
        folder = tmp_path / f"from-{step}"
        rest = tiny_trainer(folder, resume=verify(tmp_path / "whole" / f"checkpoint-{step}"), **settings)
        rest.train()
        assert digest(rest) == digest(whole), step
        assert log_in(folder / "metrics.jsonl") == log_in(tmp_path / "whole" / "metrics.jsonl")
    forgetful = tiny_trainer(resume=verify(tmp_path / "whole" / "checkpoint-2"), **settings)
    forgetful.optimizer._averages = forgetful.optimizer._averages.empty(forgetful.optimizer._averages.count)
    forgetful.train()
    assert digest(forgetful) != digest(whole)


def test_a_run_goes_on_with_its_averages_on_a_disk(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole", save_steps=1, save_total_limit=9)
    whole.train()
    rest = tiny_trainer(resume=verify(tmp_path / "whole" / "checkpoint-3"), optimizer_state="disk")
    rest.train()
    assert digest(rest) == digest(whole)


def test_the_loss_in_8_bits_falls_as_in_float32() -> None:
    losses = {}
    for state in ("float32", "int8"):
        trainer = tiny_trainer(optimizer_state=state, max_steps=60, validation=False)
        trainer.train()
        found = [record["train_loss"] for record in trainer.log.records() if "train_loss" in record]
        losses[state] = sum(found[-6:]) / 6, found[0]
    (exact, start), (rounded, _) = losses["float32"], losses["int8"]
    assert exact < 0.75 * start
    assert abs(rounded - exact) < 0.02 * (start - exact)
