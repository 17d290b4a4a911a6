"""The exception tree as it is drawn, its exit codes, and the shape of a message."""

from __future__ import annotations

import inspect
import re

import pytest

from alpaca_lora import errors
from alpaca_lora.errors import AlpacaLoraError, ConfigError, DataError, Stopped, nearest


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"([A-Z]\w+)\s+(\d+)(?:/\d+)?\s{2,}", errors.__doc__ or "")
    classes = {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, AlpacaLoraError) and cls is not AlpacaLoraError
    }
    assert {name for name, _ in drawn} == set(classes)
    assert {name: int(code) for name, code in drawn if name != "Stopped"} == {
        name: cls.exit_code for name, cls in classes.items() if name != "Stopped"
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "what"),
        ({"file": "f.yml"}, "f.yml: what"),
        ({"file": "f.yml", "line": 3, "field": "key"}, "f.yml:3: key: what"),
        ({"line": 3}, "line 3: what"),
        ({"field": "key", "expected": "a number"}, "key: what, expected a number"),
        (
            {"file": "f", "line": 1, "field": "k", "expected": "x", "fix": "do y"},
            "f:1: k: what, expected x, do y",
        ),
    ],
)
def test_a_message_has_its_parts_in_order(parts: dict[str, object], message: str) -> None:
    assert str(ConfigError("what", **parts)) == message  # type: ignore[arg-type]


def test_a_stop_has_the_signals_exit_code() -> None:
    assert (Stopped(2, "x").exit_code, Stopped(15, "x").exit_code) == (130, 143)
    assert DataError("x").exit_code == 3


def test_nearest() -> None:
    assert nearest("lora_rank", ["lora_r", "learning_rate"]) == ["lora_r"]
    assert nearest("zzz", ["lora_r"]) == []
    assert nearest("LoRA", ["lora"]) == ["lora"]
    assert nearest("lora", ["LORA", "ADALORA"]) == ["LORA"]
    assert nearest("q_prj", ["q_proj", "k_proj", "o_proj"], count=2)[0] == "q_proj"
