"""Every way in which a stranger's adapter folder can be wrong (serving cases 1 to 4), and what of it is told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.errors import AdapterError, MachineError, ModelFileError, NumericalError, UserError
from alpaca_lora.inference import checked_adapter
from tests.inference.adapter_folders import LABELS, edit, is_untouched, make_bank, make_folder, record

WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and let the record not know of it."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / "alpaca_lora.json").unlink()


# --- files (cases 1, 2, 5)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    for path in (folder, folder / name):
        with pytest.raises(UserError, match=r"pickle, which can run code"):
            bank.load("a", path)
    shutil.copy(folder / name, folder / WEIGHTS)  # under a name that sounds safe
    with pytest.raises(ModelFileError, match=WEIGHTS):
        bank.load("a", folder)
    assert is_untouched(model, bank)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda raw: raw[:-4], "cut short|ends after"),
        (lambda raw: raw[:5], "too few"),
        (lambda raw: (2**40).to_bytes(8, "little") + raw[8:], "header of"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"', 1), "dtype"),
        (lambda raw: raw.replace(b'"F32"', b'"I32"', 1), "stored as I32|int32"),
        (lambda raw: raw.replace(b"lora_A", b"lora_C", 1), "missing .*lora_A"),
        (lambda raw: raw + b"\0" * 8, "belong to none"),
    ],
)
def test_damaged_weights(tmp_path: Path, damage: Callable[[bytes], bytes], match: str) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    (folder / "alpaca_lora.json").unlink()
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    with pytest.raises((UserError, ModelFileError), match=match):
        bank.load("a", folder)
    assert is_untouched(model, bank)


def test_tensors_without_elements(tmp_path: Path) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    rewrite(folder, lambda tensors: tensors.__setitem__(Q_A, torch.zeros(0, 32)))
    with pytest.raises(AdapterError, match=r"has shape \(0, 32\), expected \(4, 32\)"):
        bank.load("a", folder)
    assert is_untouched(model, bank)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "alpaca_lora.json"])
def test_links_out_of_the_folder_and_pipes(tmp_path: Path, name: str) -> None:
    model, bank = make_bank()
    folder, secret = make_folder(tmp_path / "a"), tmp_path / "secret"
    shutil.move(folder / name, secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(ModelFileError, match="a link to a file outside of the folder"):
        bank.load("a", folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    with pytest.raises(ModelFileError, match="is missing"):
        bank.load("a", folder)
    assert is_untouched(model, bank)


def test_folders_that_are_none(tmp_path: Path) -> None:
    model, bank = make_bank()
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "missing", tmp_path, tmp_path / "file", Path("a\0b"), Path("x" * 10_000)):
        with pytest.raises(UserError):
            bank.load("a", folder)
    folder = make_folder(tmp_path / "a")
    (folder / "alpaca_lora.json").write_bytes(b" " * 5_000_000)
    with pytest.raises(ModelFileError, match="5000000 bytes"):
        bank.load("a", folder)
    (folder / "alpaca_lora.json").unlink()
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match="not JSON"):
        bank.load("a", folder)
    assert is_untouched(model, bank)


# --- weights (case 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    rewrite(folder, lambda tensors: tensors[Q_A].__setitem__((0, 0), value))
    with pytest.raises(NumericalError, match=r"q_proj.*(NaN or Inf|update of norm up to)"):
        bank.load("a", folder)
    assert is_untouched(model, bank)


def test_the_record_s_hash_is_held(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder, other = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", seed=1)
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ModelFileError, match="is not the file"):
        bank.load("a", folder)


def test_a_file_that_changes_between_header_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    real = checked_adapter.read_tensors

    def late(*args: Any) -> dict[str, torch.Tensor]:
        return {key: tensor.repeat(2, 1) for key, tensor in real(*args).items()}

    monkeypatch.setattr(checked_adapter, "read_tensors", late)
    with pytest.raises(ModelFileError, match="has changed while it was read"):
        bank.load("a", folder)
    assert is_untouched(model, bank)


# --- configurations that lie (case 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 5}, r"has shape \(4, 32\), expected \(5, 32\)"),
        ({"r": 0}, "r: is 0"),
        ({"r": 10**6}, "rank 1000000"),
        ({"r": "4"}, "r: is '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
        ({"lora_alpha": "8"}, "lora_alpha: is '8'"),
        ({"lora_alpha": 1e308}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 3}}, "expected"),
        ({"rank_pattern": {"x_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, "'LOHA' is not supported"),
        ({"peft_type": "IA3"}, r"method ia3 .*merge it"),
        ({"target_modules": "dummy-target-modules"}, r"freeze, bitfit or full .*merge it"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save: 'embed_tokens' was trained wholly.*merge it"),
        ({"modules_to_save": 7}, "modules_to_save: is 7"),
        ({"bias": "all"}, "bias"),
        ({"task_type": "SEQ_CLS"}, "is of a classifier"),
        ({"init_lora_weights": "pissa"}, "takes a part out of the base"),
        ({"target_modules": ["c_attn"]}, "'c_attn' matches nothing"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "unexpected .*v_proj"),
        ({"target_modules": [f"m{n}" for n in range(10_000)]}, "has 10000 entries, expected at most"),
        ({"target_modules": ["q_proj", "x" * 10_000]}, "an entry of 10000 characters"),
        ({"rank_pattern": {f"m{n}": 4 for n in range(10_000)}}, "rank_pattern: has 10000 entries"),
        ({"target_modules": r"(a+)+$"}, "matches nothing"),
        ({"target_modules": r"(([a-z._0-9]*)*)*!"}, "matches nothing"),
        ({"target_modules": r"(.*.*.*.*.*.*.*.*.*.*)*!"}, "matches nothing"),
        ({"target_modules": "(a|a)" * 80 + "!"}, "matches nothing"),
        ({"target_modules": "(" * 900 + "a" + ")" * 900}, "more than 40 groups"),
        ({"target_modules": r"(.)\1"}, r"\\1 is not understood here"),
        ({"target_modules": ["q_proj", r"(([a-z.]*)*)*!"]}, "unexpected|missing"),
        ({"exclude_modules": r"(([a-z._0-9]*)*)*!", "target_modules": ["k_proj"]}, "missing"),
        ({"rank_pattern": {r"(([a-z._0-9]*)*)*!": 9}, "target_modules": ["k_proj"]}, "missing"),
        ({"layers_to_transform": [0], "layers_pattern": r"(a*)*"}, "layers_pattern"),
        ({"layers_to_transform": [7]}, "names no linear"),
    ],
)
def test_configurations_that_lie(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    edit(folder, **changes)
    started = time.monotonic()
    with pytest.raises(AdapterError, match=match) as caught:
        bank.load("a", folder)
    assert time.monotonic() - started < 10  # what backtracks would take years
    assert "adapter" in str(caught.value) and len(str(caught.value)) < 2000
    assert is_untouched(model, bank)


def test_virtual_tokens_that_lie(tmp_path: Path) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a", "prefix")
    for changes, match in (
        ({"num_virtual_tokens": 4}, r"shape \(3, 64\), expected \(4, 64\)"),
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 3, "num_layers": 5}, "num_layers"),
    ):
        edit(folder, **changes)
        with pytest.raises(AdapterError, match=match):
            bank.load("a", folder)
    assert is_untouched(model, bank)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base_fingerprint": "another"}, r"another base model \(tiny\): fingerprint another, here fingerprint-of"),
        ({"tokenizer_fingerprint": "another"}, "another tokenizer"),
    ],
)
def test_another_base(tmp_path: Path, changes: dict[str, str], match: str) -> None:
    model, bank = make_bank(tokenizer_fingerprint="words")
    with pytest.raises(AdapterError, match=match):
        bank.load("a", make_folder(tmp_path / "a", note=record(**changes)))
    assert is_untouched(model, bank)
    bank.load("a", make_folder(tmp_path / "b", note=record(tokenizer_fingerprint="words")))


def test_labels_that_are_not_as_many_as_the_head_has(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder = make_folder(tmp_path / "a", labels=LABELS)
    note = json.loads((folder / "alpaca_lora.json").read_text())
    (folder / "alpaca_lora.json").write_text(json.dumps({**note, "labels": ["red"]}))
    with pytest.raises(AdapterError, match="names 1 labels, the head has 3 outputs"):
        bank.load("a", folder)
    (folder / "alpaca_lora.json").unlink()
    assert bank.load("a", folder).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_too_large_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = make_bank()
    monkeypatch.setattr(checked_adapter, "available_memory_bytes", lambda: 1000)
    with pytest.raises(MachineError, match="are free, unload other adapters"):
        bank.load("a", make_folder(tmp_path / "a"))
    assert is_untouched(model, bank)


def test_unknown_keys_and_targets_are_told(tmp_path: Path) -> None:
    _, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    edit(folder, made_by="somebody", target_modules=["q_proj", "v_proj", "query_key_value"])
    messages = bank.load("a", folder).messages
    assert len(messages) == 2 and "made_by: unknown key" in messages[0] and "query_key_value" in messages[1]
