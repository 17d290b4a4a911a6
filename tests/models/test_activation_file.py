"""Activations in a file: what is read is what was written, the file is used again, and nothing of it stays behind."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import MachineError
from alpaca_lora.models.activation_file import SMALLEST, ActivationFile
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.recompute import stored
from tests.models.hf_models import hf_model, ours_from

BIG_THF = torch.randn(32, 64, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[3:9], lambda x: x[:1, :1, :1]]
)
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype, view) -> None:
    file = ActivationFile(tmp_path)
    tensors = [view((BIG_THF * 100).to(dtype)), view((BIG_THF + 1).to(dtype))]
    kept = [file.write(one) for one in tensors]
    assert file.num_written == sum(one.numel() * one.element_size() for one in tensors)
    for one, found in zip(reversed(tensors), reversed([each.read() for each in kept]), strict=True):
        assert torch.equal(one, found) and one.dtype == found.dtype
        assert not (one.is_contiguous() or one.mT.is_contiguous()) or one.stride() == found.stride()


def test_a_file_begins_anew_once_nothing_in_it_is_wanted(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path)
    first, second = file.write(BIG_THF), file.write(BIG_THF + 1)
    del first
    third = file.write(BIG_THF + 2)
    assert third.start > second.start and torch.equal(second.read(), BIG_THF + 1)
    del second, third
    assert file.write(BIG_THF).start == 0


def test_it_lies_in_the_nearest_folder_and_has_no_name(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "runs" / "not yet made")
    kept = file.write(BIG_THF)
    assert list(tmp_path.iterdir()) == [] and torch.equal(kept.read(), BIG_THF)
    places = [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if one.isdigit()
              if os.path.exists(f"/proc/self/fd/{one}") or os.path.islink(f"/proc/self/fd/{one}")]  # fmt: skip
    assert any(place.startswith(str(tmp_path)) and place.endswith("(deleted)") for place in places)


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpaca_lora.models.activation_file.os.pwrite", full)
    with pytest.raises(MachineError, match=r"gradient_checkpointing: cannot hold .*: No space left on device"):
        ActivationFile(tmp_path).write(BIG_THF)


def test_a_file_that_was_cut_is_one_message(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path)
    kept = file.write(BIG_THF)
    assert file._file is not None
    os.ftruncate(file._file.fileno(), 1000)
    with pytest.raises(MachineError, match="has become shorter"):
        kept.read()


def test_a_tensor_is_written_once_and_shared_ones_never(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path)
    x = torch.randn(64, 512, requires_grad=True) * 1
    shared = torch.randn(64, 512)
    small = torch.randn(SMALLEST // 4 - 1) * torch.ones(1, requires_grad=True)
    with stored(file, (shared, ())):
        total = (x.exp() * 0).sum() + (x * x).sum() + (x * shared).sum() + (small * small).sum()
    # x once, and what exp saves of its own
    assert file.num_written == 2 * x.numel() * 4
    total.backward()


def test_what_is_written_is_not_held(tmp_path: Path) -> None:
    x = torch.randn(64, 512, requires_grad=True)
    with stored(ActivationFile(tmp_path), ()):
        middle = x * 2
        seen = weakref.ref(middle)
        total = (middle * middle).sum()
        del middle
        assert seen() is not None  # until the layer is through: its memory would be taken for another's
    gc.collect()
    assert seen() is None
    total.backward()
    assert x.grad is not None and torch.equal(x.grad, 8 * x.detach())


def test_a_decoder_keeps_its_activations_there_and_no_weights(tmp_path: Path) -> None:
    model = ours_from(hf_model("llama2-grouped-query")).requires_grad_(True)
    model.activation_file = ActivationFile(tmp_path)
    ids_T = torch.arange(600) % 90

    def gradient(levels) -> list[torch.Tensor]:
        model.gradient_checkpointing = levels
        model.zero_grad()
        model(ids_T, torch.arange(600), Packed((600,))).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradient(False)
    assert model.activation_file.num_written == 0
    found = gradient(("disk",) * model.config.num_layers)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    once = model.activation_file.num_written
    assert once > 600 * model.config.hidden_size * 4 * model.config.num_layers
    gradient(("disk",) * model.config.num_layers)
    assert model.activation_file.num_written == 2 * once
    assert model.activation_file._file is not None
    assert os.fstat(model.activation_file._file.fileno()).st_size == once  # written over, not longer
