"""Names to files: paths, aliases, hub ids (against a stand-in server, in a process of their own), and what is none."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alpaca_lora.errors import MachineError, ModelFileError, UserError
from alpaca_lora.weights import packaged
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.huggingface import write_folder
from tests.weights.hub_server import HubServer


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_LORA_HOME", str(tmp_path / "home"))


def test_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "org" / "name", [("w", torch.ones(2))], {})
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # a folder wins over the hub
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    assert resolve("m.gguf") == Path("m.gguf")
    (tmp_path / "blob").write_bytes(b"GGUF....")
    assert resolve("blob") == Path("blob")
    (tmp_path / "only").mkdir()
    (tmp_path / "m.gguf").rename(tmp_path / "only" / "m.gguf")
    assert resolve("only") == Path("only/m.gguf")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelFileError, match=r"is a pickle.*safetensors"):
        resolve(str(tmp_path / "m.bin"))
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give the folder that holds it"):
        resolve(str(tmp_path / "m.safetensors"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="is no model"):
        resolve(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-130m", "there is no model 'smollm2-130m'.*did you mean 'smollm2-135m'"),
        ("zzz", r"there is no model 'zzz', expected a folder, a \.gguf file, a hub id \(org/name\) or one of smollm2-"),
        ("", "is empty"),
        ("a\0b", "is empty"),
        ("./nothing/here", "there is no file or folder"),
        ("/no/such/folder", "there is no file or folder"),
        ("../evil", "there is no file or folder"),
        ("org/..", "there is no file or folder"),
        ("org/a..b", "there is no file or folder"),
        ("org/name/more", "there is no file or folder"),
        ("org/nothing.gguf", "there is no file or folder"),
        ("smollm2-135m/../x", "there is no file or folder"),
        ("https://evil/x", "there is no file or folder"),
    ],
)
def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(name)
    assert list(tmp_path.iterdir()) == []


def test_alias_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = packaged.PackagedModel("m.gguf", 4, "", (), "free")
    monkeypatch.setattr("alpaca_lora.weights.hub.ALIASES", {"small": small})
    cached = tmp_path / "home" / "models" / "small" / "m.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"GGUF")
    assert resolve("small") == cached


# --- the hub ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.weights.hub import resolve
from alpaca_lora.weights.huggingface import open_folder
try:
    path = resolve(sys.argv[1])
    source = open_folder(path)
    tensors = {name: source.read(name).tolist() for name in source.shapes}
    print(json.dumps({"path": str(path), "tensors": tensors, "files": sorted(p.name for p in path.iterdir())}))
except AlpacaLoraError as error:
    print(json.dumps({"error": type(error).__name__, "said": str(error)}))
"""


def resolve_elsewhere(name: str, folder: Path, url: str, **environment: str) -> dict[str, object]:
    """`resolve` in a process whose hub is ``url`` and whose cache is below ``folder``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    kept |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    folder = tmp_path / "repository"
    weights = {"a": torch.ones(2), "b": torch.zeros(2)}
    write_folder(folder, weights.items(), {"model_type": "llama"}, max_shard_bytes=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    for name in (
        "pytorch_model.bin",
        "modeling_evil.py",
        "README.md",
        "consolidated.safetensors",
        "onnx/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no")
    server = HubServer("org/tiny", folder)
    yield server
    server.close()


def test_hub_id(hub: HubServer, tmp_path: Path) -> None:
    """Fetched with links into the blobs of the hub's cache, only what a model needs; then found without a network."""
    result = resolve_elsewhere("org/tiny", tmp_path, hub.url)
    assert result.get("tensors") == {"a": [1.0, 1.0], "b": [0.0, 0.0]}, result
    expected = [
        "chat_template.jinja", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert result["files"] == expected == sorted(set(hub.asked))
    assert any(p.is_symlink() for p in Path(str(result["path"])).iterdir())
    offline = resolve_elsewhere("org/tiny", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline == result


def test_hub_without_the_model(hub: HubServer, tmp_path: Path) -> None:
    result = resolve_elsewhere("org/smollm2-135", tmp_path, hub.url)
    assert result["error"] == "UserError"
    assert "the hub has no model 'org/smollm2-135'" in str(result["said"])
    assert "did you mean 'smollm2-135m'?" in str(result["said"])


def test_hub_offline(tmp_path: Path) -> None:
    result = resolve_elsewhere("org/tiny", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert result["error"] == "MachineError"
    assert "the hub cannot be reached and org/tiny is not in its cache" in str(result["said"])


def test_hub_out_of_reach(tmp_path: Path) -> None:
    result = resolve_elsewhere("org/tiny", tmp_path, "http://127.0.0.1:9")
    assert result["error"] == "MachineError", result


def test_hub_with_pickles_only(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    server = HubServer("org/old", folder)
    try:
        result = resolve_elsewhere("org/old", tmp_path, server.url)
    finally:
        server.close()
    assert result["error"] == "ModelFileError" and "no safetensors weights" in str(result["said"])
    assert "pytorch_model.bin" not in server.asked


def test_hub_package_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MachineError, match=r"needs huggingface_hub, pip install 'alpaca-lora\[hub\]'"):
        resolve("org/tiny")
