"""`alpaca-lora merge` through the command line: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.cli import main
from alpaca_lora.models.load import load_base
from tests.adapters.conftest import our_logits, train_a_little
from tests.adapters.test_merge import COMPUTE, base_folder

Say = pytest.CaptureFixture[str]


def prepare(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """folder/base and folder/adapter, made for each other -> the logits of base + adapter."""
    base = load_base(str(base_folder(folder / "base", dtype)), COMPUTE)
    adapter = Lora.attach(base.model, AdapterOptions(lora_r=4, lora_alpha=8), seed=0)
    train_a_little(adapter)
    record = AdapterRecord("base", base.fingerprint, template={"name": "alpaca"})
    save_adapter(folder / "adapter", adapter, record)
    return our_logits(base.model)


def merge(folder: Path, *flags: str, **names: str) -> int:
    named = {"base_model": "base", "lora_weights": "adapter", "output_dir": "merged", **names}
    words = [word for key, name in named.items() for word in (f"--{key}", str(folder / name))]
    return main(["merge", *words, "--num_threads", "1", *flags])


def test_the_folder_it_reports_is_base_plus_adapter(tmp_path: Path, capsys: Say) -> None:
    wanted = prepare(tmp_path)
    assert merge(tmp_path, "--json") == 0
    said = capsys.readouterr()
    result: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    assert set(result) >= {"max_logit_difference", "mean_logit_difference", "output_dir", "seconds", "merge_dtype"}
    assert result["merge_dtype"] == "float32" and 0 < result["max_logit_difference"] < 1e-4
    assert "largest logit difference" in said.err and "its template (alpaca) is in the folder" in said.err
    merged = load_base(result["output_dir"], COMPUTE)
    assert (our_logits(merged.model) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("stored", "flags", "expected"),
    [(torch.bfloat16, (), "bfloat16"), (torch.bfloat16, ("--dtype", "float32"), "float32")],
)
def test_auto_keeps_the_precision_of_the_base(
    tmp_path: Path, capsys: Say, stored: torch.dtype, flags: tuple[str, ...], expected: str
) -> None:
    prepare(tmp_path, stored)
    assert merge(tmp_path, "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["merge_dtype"] == expected
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == expected


def test_a_bound_that_is_passed_publishes_nothing(tmp_path: Path, capsys: Say) -> None:
    prepare(tmp_path)
    assert merge(tmp_path, "--max_logit_difference", "1e-12") == 5
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path, capsys: Say) -> None:
    prepare(tmp_path)
    file = tmp_path / "adapter" / "alpaca_lora.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "base_fingerprint": "0" * 64}))
    assert merge(tmp_path) == 2
    said = capsys.readouterr().err
    assert "0" * 64 in said and record["base_fingerprint"] in said


def test_what_is_not_there_is_said_at_once(tmp_path: Path, capsys: Say) -> None:
    prepare(tmp_path)
    assert merge(tmp_path, lora_weights="nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    assert merge(tmp_path, output_dir="base") == 2
    assert "exists already" in capsys.readouterr().err
