"""alpaca_lora.json: what is written comes back; anything else is an error that names the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alpaca_lora.adapters.record import RECORD_FORMAT, AdapterRecord, read_record
from alpaca_lora.errors import ModelFileError

FULL = AdapterRecord(
    base_model="some/model", base_fingerprint="ab12", template={"name": "alpaca", "text": "### 指令:\n"},
    system_prompt="Be brief.", stop_ids=[2, 5], stop_strings=["###"], add_bos=True, add_eos=False,
    tokenizer_fingerprint="cd34", data_hashes={"a.json": "ef56"}, config={"lora_r": 8}, metrics={"val_loss": 1.25},
    version="0.1.0",
)  # fmt: skip


def test_round_trip_is_equal_and_byte_equal() -> None:
    text = FULL.to_json()
    again = AdapterRecord.from_json(text, file="f")
    assert again == FULL and again.to_json() == text
    assert "指令" in text  # people read this file


def test_two_names_are_enough() -> None:
    made = AdapterRecord.from_json('{"base_model": "m", "base_fingerprint": "f"}', file="f")
    assert made == AdapterRecord("m", "f")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base_model": None}, "base_model"), ({"stop_ids": ["2"]}, "stop_ids"), ({"stop_ids": [True]}, "stop_ids"),
        ({"add_bos": 1}, "add_bos"), ({"format_version": True}, "format_version"),
        ({"data_hashes": {"a": 1}}, "data_hashes"),
        ({"template": "alpaca"}, "template"), ({"system_promt": "x"}, "did you mean 'system_prompt'"),
        ({"format_version": RECORD_FORMAT + 1}, "newer"),
    ],
)  # fmt: skip
def test_wrong_content_names_file_and_field(tmp_path: Path, change: dict[str, object], field: str) -> None:
    file = tmp_path / "alpaca_lora.json"
    file.write_text(json.dumps({**json.loads(FULL.to_json()), **change}), encoding="utf-8")
    with pytest.raises(ModelFileError, match=field) as caught:
        read_record(tmp_path)
    assert str(caught.value).startswith(str(file)) and caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"base_model": "m"}'])
def test_damage_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "alpaca_lora.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"alpaca_lora\.json"):
        read_record(tmp_path)


def test_a_folder_without_record_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
