"""`alpaca-lora combine` through the command line: what it says, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from alpaca_lora.adapters.combine import KINDS
from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.cli import main
from alpaca_lora.commands.schemas import CombinationKind
from tests.adapters.conftest import our_logits
from tests.adapters.test_combined_folder import RECORD, adapter_folder
from tests.tiny import tiny_model

Say = pytest.CaptureFixture[str]


def run(folder: Path, *words: str, **options: Any) -> int:
    settings = {"output_dir": folder / "c", **options}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return main(["combine", "--lora_weights", str(folder / "a"), str(folder / "b"), *words, *flags, "--json"])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder that holds the adapters a and b."""
    adapter_folder(tmp_path / "a")
    adapter_folder(tmp_path / "b", 1)
    return tmp_path


def test_the_schema_has_every_kind() -> None:
    assert get_args(CombinationKind) == tuple(KINDS)


def test_it_writes_an_adapter_and_says_what_it_did(two: Path, capsys: Say) -> None:
    words = ["--combination_weights", "0.7", "-0.3"]
    assert run(two, *words, combination="ties", density=0.5, majority_sign_method="frequency", seed=3) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out.splitlines()[-1])
    assert said["combination_weights"] == [0.7, -0.3] and said["combination"] == "ties"
    assert (said["num_modules"], said["min_rank"], said["max_rank"]) == (4, 4, 4)
    assert said["norm"] > 0 and said["distance"] > 0.1 and abs(said["cosines"][0][1]) < 0.5
    assert "ties: 4 modules, rank 4" in printed.err and "away from the weighted sum" in printed.err
    assert sorted(os.listdir(two / "c")) == ["adapter_config.json", "adapter_model.safetensors", "alpaca_lora.json"]
    model = tiny_model()
    before = our_logits(model)
    load_adapter(two / "c", model, RECORD.base_fingerprint)
    assert (our_logits(model) - before).abs().max() > 0.05


def test_without_weights_it_is_the_mean(two: Path, capsys: Say) -> None:
    assert run(two) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out.splitlines()[-1])
    assert said["combination_weights"] == [0.5, 0.5] and said["distance"] < 1e-5
    assert "cat: 4 modules, rank 8" in printed.err and ", the weighted sum" in printed.err
    assert "work against each other" not in printed.err


@pytest.mark.parametrize(("weights", "says"), [(("1", "0.9"), True), (("1", "-0.9"), False)])
def test_adapters_that_cancel_are_named(tmp_path: Path, capsys: Say, weights: tuple[str, str], says: bool) -> None:
    adapter_folder(tmp_path / "a")
    adapter_folder(tmp_path / "minus")
    assert main(["combine", "--lora_weights", str(tmp_path / "a"), str(tmp_path / "minus"),
                 "--combination_weights", "0", "-1", "--output_dir", str(tmp_path / "b")]) == 0  # fmt: skip
    assert run(tmp_path, "--combination_weights", *weights) == 0
    assert ("a and b work against each other (mean cosine -1.00)" in capsys.readouterr().err) == says


def test_settings_are_judged_before_files_are_read(tmp_path: Path, capsys: Say) -> None:
    """There are no folders here: each message is about the settings."""
    for words, says in (
        (["--combination_weights", "1"], "1 weights for 2 adapters"),
        (["--combination_weights", "1", "x"], "'x' is not possible"),
        (["--combination", "tie"], "did you mean 'ties'"),
        (["--combination", "ties"], "density: missing, expected share of entries"),
        (["--density", "0.5"], "--density: combination cat has none"),
        (["--svd_rank", "4"], "--svd_rank: combination cat has none"),
        (["--combination", "ties", "--density", "0"], "0 is not possible, expected a number > 0"),
    ):
        assert run(tmp_path, *words) == 2
        assert says in capsys.readouterr().err


def test_what_is_refused_leaves_nothing(two: Path, capsys: Say) -> None:
    assert main(["combine", "--lora_weights", str(two / "a"), "--output_dir", str(two / "c")]) == 2
    assert "--lora_weights" in capsys.readouterr().err
    assert run(two, output_dir=two / "a") == 2
    assert "exists already" in capsys.readouterr().err
    adapter_folder(two / "b2", 1, dataclasses.replace(RECORD, template={"name": "chatml"}))
    (two / "b").rename(two / "b1")
    (two / "b2").rename(two / "b")
    assert run(two) == 2
    said = capsys.readouterr().err
    assert "template 'alpaca'" in said and "template 'chatml'" in said and "Traceback" not in said
    assert sorted(os.listdir(two)) == ["a", "b", "b1"]


def test_a_sum_of_nothing_has_no_distance(tmp_path: Path, capsys: Say) -> None:
    """a - a is zero, what ties keeps of both is not."""
    adapter_folder(tmp_path / "a")
    adapter_folder(tmp_path / "b")
    assert run(tmp_path, "--combination_weights", "1", "-1", combination="linear") == 2
    assert "changes nothing" in capsys.readouterr().err
    assert run(tmp_path, "--combination_weights", "1", "-1", combination="dare_linear", density=0.5) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["distance"] is None
    assert "the weighted sum itself is zero" in printed.err
