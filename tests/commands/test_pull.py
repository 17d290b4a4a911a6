"""`alpaca-lora pull`: what it returns and what it says."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alpaca_lora.commands.pull import run
from alpaca_lora.commands.schemas import PullConfig
from alpaca_lora.config import Resolved
from alpaca_lora.errors import ModelFileError, UserError
from alpaca_lora.weights.huggingface import write_folder
from alpaca_lora.weights.packaged import ALIASES


def pull(name: str) -> tuple[dict[str, object], str]:
    config = PullConfig(name=name)
    console = Console(file=io.StringIO(), width=200)
    result = run(config, resolved=Resolved(config, {"name": "flag"}, "pull"), console=console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_alias(smollm2: Path) -> None:
    result, said = pull("smollm2-135m")
    model = ALIASES["smollm2-135m"]
    assert result == {
        "base_model": "smollm2-135m", "path": str(smollm2), "bytes": model.num_bytes, "sha256": model.sha256,
    }  # fmt: skip
    for part in (str(smollm2), "98.4 MB", model.sha256, "llama, 272 tensors"):
        assert part in said


def test_folder(tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {}}
    path = write_folder(tmp_path / "[m]", [("w", torch.ones(2))], config)
    result, said = pull(str(path))
    files = sorted(path.iterdir())
    lines = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
    assert result["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert result["bytes"] == sum(f.stat().st_size for f in files)
    assert "llama, 1 tensors" in said and "[m]" in said and "auto_map is ignored" in said


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        pull("smollm-135m")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"m\.gguf"):
        pull(str(tmp_path / "m.gguf"))
