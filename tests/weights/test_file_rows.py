"""Rows of a matrix that stays in its file: the same numbers, no memory, and nothing stale."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpaca_lora.device import Compute
from alpaca_lora.errors import ModelFileError, NumericalError
from alpaca_lora.models.layers import Embedding
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.weights import huggingface
from alpaca_lora.weights.file_rows import FileRows
from alpaca_lora.weights.huggingface import open_folder
from alpaca_lora.weights.safetensors_file import read_header, write_safetensors
from tests.adapters.conftest import our_logits
from tests.commands.conftest import write_base

COMPUTE = Compute(torch.device("cpu"), torch.float32, 1, "test")
NAME = "model.embed_tokens.weight"


@pytest.fixture
def stored(tmp_path: Path) -> tuple[FileRows, torch.Tensor]:
    weight_VD = torch.randn(50, 24).bfloat16()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(3), "table": weight_VD})
    entry = read_header(path).tensors["table"]
    return FileRows(path, "table", entry.start, entry.shape, torch.bfloat16), weight_VD


def test_rows_are_those_of_the_matrix(stored: tuple[FileRows, torch.Tensor]) -> None:
    rows, weight_VD = stored
    assert torch.equal(rows.weight, weight_VD)
    for ids in ([], [3], [49, 0, 3, 3, 49, 17]):
        ids_N = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(rows.read(ids_N), weight_VD[ids_N])
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            rows.read(torch.tensor([0, outside]))


def test_writing_to_the_matrix_leaves_the_file_alone(stored: tuple[FileRows, torch.Tensor]) -> None:
    rows, weight_VD = stored
    rows.weight.zero_()
    assert torch.equal(rows.read(torch.arange(50)), weight_VD)


def test_a_file_that_shrank_is_an_error(stored: tuple[FileRows, torch.Tensor]) -> None:
    rows, _ = stored
    with open(rows.path, "r+b") as file:
        file.truncate(rows.start + 48 * 10 + 7)
    rows.read(torch.arange(10))
    with pytest.raises(ModelFileError, match="the file ends inside of this tensor"):
        rows.read(torch.tensor([10]))


def test_a_table_that_changes_is_not_read_from_the_file(stored: tuple[FileRows, torch.Tensor]) -> None:
    rows, weight_VD = stored
    ids_T = torch.tensor([1, 4, 1])

    def read(embedding: Embedding) -> bool:
        """Whether rows come from the file, whatever they are."""
        return embedding(ids_T).data_ptr() != 0 and embedding._is_as_stored()

    embedding = Embedding(50, 24)
    embedding.stay_in_file(rows)
    assert read(embedding) and torch.equal(embedding(ids_T), weight_VD[ids_T])
    twin = copy.deepcopy(embedding)
    with torch.no_grad():
        twin.weight.add_(1)
    assert not read(twin) and torch.equal(twin(ids_T), weight_VD[ids_T] + 1)
    assert read(embedding)  # the copy had memory of its own
    embedding.weight.requires_grad_(True)
    embedding(ids_T).float().sum().backward()
    assert embedding.weight.grad is not None and embedding.weight.grad.count_nonzero() == 2 * 24
    embedding.weight = torch.nn.Parameter(torch.zeros(50, 24), requires_grad=False)
    assert not read(embedding) and not embedding(ids_T).any()


def loaded(folder: Path, least: int, monkeypatch: pytest.MonkeyPatch, **more: bool) -> Base:
    monkeypatch.setattr(huggingface, "LEAST_FILE_ROWS", least)
    return load_base(str(folder), COMPUTE)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    folder = write_base(tmp_path / "base", tie_word_embeddings=tied)
    in_memory, in_file = loaded(folder, 2**40, monkeypatch), loaded(folder, 0, monkeypatch)
    assert not in_memory.model.embeddings._is_as_stored()
    assert in_file.model.embeddings._is_as_stored() is not tied
    assert torch.equal(our_logits(in_memory.model), our_logits(in_file.model))
    assert in_memory.fingerprint == in_file.fingerprint


def test_numbers_that_are_none_are_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "base", tie_word_embeddings=False)
    source = open_folder(folder)
    entry, shard = source._entry(NAME), source.where(NAME)
    with open(shard, "r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(NumericalError):
        loaded(folder, 0, monkeypatch)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"table": torch.randn(40_000, 512)})
    code = f"""
import torch
from alpaca_lora.device import current_memory_bytes
from alpaca_lora.weights.file_rows import FileRows
from alpaca_lora.weights.safetensors_file import read_header
entry = read_header({str(path)!r}).tensors["table"]
ids = torch.arange(0, 40_000, 8)
torch.randn(5000, 512).sum()
before = current_memory_bytes()
rows = FileRows({str(path)!r}, "table", entry.start, entry.shape, torch.float32)
taken = rows.read(ids)
print(current_memory_bytes() - before - taken.nbytes, rows.weight.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, stored = map(int, done.stdout.split())
    assert grown < stored / 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_frozen_table_takes_no_memory_after_it_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"table": torch.randn(40_000, 512)})
    code = f"""
import torch
from alpaca_lora.device import current_memory_bytes
from alpaca_lora.models.layers import Embedding
from alpaca_lora.training.guards import FrozenCheck
from alpaca_lora.weights.file_rows import FileRows
from alpaca_lora.weights.safetensors_file import read_header
entry = read_header({str(path)!r}).tensors["table"]
embedding = Embedding(40_000, 512, dtype=torch.float32, device="meta")
embedding.stay_in_file(FileRows({str(path)!r}, "table", entry.start, entry.shape, torch.float32))
torch.ones(5000, 512, dtype=torch.int32).sum(dtype=torch.int64)
before = current_memory_bytes()
check = FrozenCheck(torch.nn.Sequential(embedding))
check.check()
print(current_memory_bytes() - before, embedding.weight.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, stored = map(int, done.stdout.split())
    assert grown < stored / 8
