"""Model folders in and out, and folders that are damaged or hostile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alpaca_lora.errors import MachineError, ModelFileError, NumericalError, UserError
from alpaca_lora.weights.huggingface import open_folder, write_folder

CONFIG = {"model_type": "llama", "hidden_size": 8}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(6)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three shards of two tensors."""
    return write_folder(tmp_path / "model", weights().items(), CONFIG, max_shard_bytes=2 * 8 * 8 * 4)


def change_index(folder: Path, tensor: str, shard: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


SHARD = "model-00002-of-00003.safetensors"  # layers.2 and layers.3


@pytest.mark.parametrize("max_shard_bytes", [10**9, 2 * 8 * 8 * 4, 1])
def test_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    expected = weights()
    path = write_folder(tmp_path / "m", expected.items(), CONFIG, max_shard_bytes=max_shard_bytes)
    source = open_folder(path)
    assert source.config == CONFIG
    assert source.shapes == {name: (8, 8) for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, dtype=torch.bfloat16), tensor.bfloat16())
        assert name in safetensors.torch.load_file(source.where(name))
    source.close()
    assert source.notices == []


def test_what_transformers_writes_is_read_and_what_we_write_transformers_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    source = open_folder(tmp_path / "theirs")
    state = model.state_dict()
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_folder(tmp_path / "ours", ((n, source.read(n)) for n in source.shapes), source.config, max_shard_bytes=20_000)
    source.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert open_folder(tmp_path / "ours").fingerprint == source.fingerprint


def test_extra_files_and_tokenizer(tmp_path: Path) -> None:
    def save_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    path = write_folder(
        tmp_path / "m", weights().items(), CONFIG, extra_files={"note.txt": b"hello"}, tokenizer_saver=save_tokenizer
    )
    names = {p.name for p in path.iterdir()}
    assert names == {"config.json", "model.safetensors", "note.txt", "tokenizer.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# --- a write that fails leaves nothing -------------------------------------------------------------------------------


def test_existing_target_is_refused_and_untouched(sharded: Path) -> None:
    before = {p.name: p.read_bytes() for p in sharded.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        write_folder(sharded, weights(1).items(), CONFIG)
    assert {p.name: p.read_bytes() for p in sharded.iterdir()} == before


def test_empty_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_folder(tmp_path / "m", weights().items(), CONFIG)
    assert len(open_folder(tmp_path / "m").shapes) == 6


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights().items())[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "m", broken(), CONFIG, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpaca_lora.weights.huggingface.os.rename", full)
    with pytest.raises(MachineError, match="No space left"):
        write_folder(tmp_path / "m", weights().items(), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_no_tensors_or_one_twice(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no tensors"):
        write_folder(tmp_path / "m", [], CONFIG)
    for most in (1, 10**9):
        with pytest.raises(ValueError, match="given twice"):
            write_folder(tmp_path / "m", [("a", torch.ones(2)), ("a", torch.ones(2))], CONFIG, max_shard_bytes=most)
    assert list(tmp_path.iterdir()) == []


# --- shards: missing, short, flipped ---------------------------------------------------------------------------------


def test_missing_shard_names_shard_and_tensor(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    with pytest.raises(ModelFileError, match=rf"layers\.2\.weight: .*{SHARD}.* is missing"):
        open_folder(sharded)


def test_short_shard_names_shard_and_tensor(sharded: Path) -> None:
    with open(sharded / SHARD, "rb+") as file:
        file.truncate((sharded / SHARD).stat().st_size - 4)
    with pytest.raises(ModelFileError, match=rf"{SHARD}: layers\.3\.weight: its bytes reach to"):
        open_folder(sharded)


def test_flipped_header_names_shard(sharded: Path) -> None:
    raw = bytearray((sharded / SHARD).read_bytes())
    raw[raw.index(b"layers.2")] ^= 1
    (sharded / SHARD).write_bytes(raw)
    with pytest.raises(ModelFileError, match=rf"{SHARD}: layers\.2\.weight: is not in the file"):
        open_folder(sharded)


def test_nan_names_shard_and_tensor(sharded: Path) -> None:
    raw = bytearray((sharded / SHARD).read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    (sharded / SHARD).write_bytes(raw)
    source = open_folder(sharded)
    source.read("layers.2.weight")
    with pytest.raises(NumericalError, match=rf"{SHARD}: layers\.3\.weight: weights that are NaN"):
        source.read("layers.3.weight")
    source.close()


def test_swapped_shards_are_found(sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / SHARD)
    with pytest.raises(ModelFileError, match=rf"{SHARD}: layers\.2\.weight: is not in the file"):
        open_folder(sharded)


def test_tensor_beside_the_index_is_told(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["layers.3.weight"]
    path.write_text(json.dumps(index))
    source = open_folder(sharded)
    assert "layers.3.weight" not in source.shapes
    assert len(source.notices) == 1 and "layers.3.weight" in source.notices[0] and SHARD in source.notices[0]


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}])
def test_index_without_a_map(sharded: Path, weight_map: object) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFileError, match="weight_map"):
        open_folder(sharded)


# --- an index that leads out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["../", "absolute", "link", "sub-folder", "backslash", "pickle"])
def test_index_that_leads_out_is_refused(sharded: Path, kind: str) -> None:
    shutil.copy(sharded / SHARD, sharded.parent / "out.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(sharded / SHARD, sharded / "sub" / "out.safetensors")
    (sharded / "link.safetensors").symlink_to("../out.safetensors")
    shard = {
        "../": "../out.safetensors",
        "absolute": str(sharded.parent / "out.safetensors"),
        "link": "link.safetensors",
        "sub-folder": "sub/out.safetensors",
        "backslash": "sub\\out.safetensors",
        "pickle": "pytorch_model.bin",
    }[kind]
    change_index(sharded, "layers.2.weight", shard)
    with pytest.raises(ModelFileError, match=r"index\.json: layers\.2\.weight: .*(names the file|outside)"):
        open_folder(sharded)


def test_link_inside_of_the_folder_is_fine(sharded: Path) -> None:
    (sharded / "link.safetensors").symlink_to(SHARD)
    change_index(sharded, "layers.2.weight", "link.safetensors")
    source = open_folder(sharded)
    assert torch.equal(source.read("layers.2.weight"), weights()["layers.2.weight"])
    source.close()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_single_files_may_not_lead_out_either(tmp_path: Path, name: str) -> None:
    path = write_folder(tmp_path / "m", weights().items(), CONFIG, extra_files={"tokenizer.json": b"{}"})
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelFileError, match="link to a file outside"):
        open_folder(path)


# --- what is no model, or not safe -----------------------------------------------------------------------------------


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickle_is_refused_and_not_executed(tmp_path: Path, name: str) -> None:
    model, song = tmp_path / "m", tmp_path / "song"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / name).write_bytes(pickle.dumps(Canary(str(song))))
    with pytest.raises(ModelFileError, match=rf"only pickle weights \({name}\).*save it as safetensors"):
        open_folder(model)
    assert not song.exists()
    pickle.loads((model / name).read_bytes())
    assert song.exists(), "the canary must sing when it is opened, or this test shows nothing"


def test_code_of_a_model_is_not_run_and_that_is_told(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", weights().items(), {**CONFIG, "auto_map": {"AutoModel": "evil.Evil"}})
    (path / "evil.py").write_text("raise SystemExit('ran')")
    source = open_folder(path)
    assert "auto_map" not in source.config
    assert len(source.notices) == 1 and "auto_map is ignored" in source.notices[0]


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"config\.json: is missing"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"holds no weights, expected model\.safetensors"):
        open_folder(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter, not of a model.*--lora_weights"):
        open_folder(adapter)


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_model_and_not_its_files(tmp_path: Path) -> None:
    def fingerprint(name: str, tensors: dict[str, torch.Tensor], config: dict[str, object], most: int = 10**9) -> str:
        return open_folder(write_folder(tmp_path / name, tensors.items(), config, max_shard_bytes=most)).fingerprint

    base = fingerprint("a", weights(), dict(CONFIG))
    assert len(base) == 64
    assert fingerprint("sharded", weights(), dict(CONFIG), 1) == base
    resaved = {**CONFIG, "transformers_version": "9", "dtype": "x", "_name_or_path": "y", "auto_map": {}}
    assert fingerprint("re-saved", weights(), resaved) == base
    changed = weights()
    changed["layers.5.weight"] = changed["layers.5.weight"] * 1.001
    assert fingerprint("changed", changed, dict(CONFIG)) != base
    assert fingerprint("other dtype", {n: t.bfloat16() for n, t in weights().items()}, dict(CONFIG)) != base
    assert fingerprint("other shape", {n: t.view(4, 16) for n, t in weights().items()}, dict(CONFIG)) != base
    assert fingerprint("other config", weights(), {**CONFIG, "rope_theta": 1e6}) != base
