"""The public names: at most fifteen, lazy, and each there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import alpaca_lora
from tests.package_files import CHECKOUT

NAMES = """AlpacaLoraError Conversation Engine Loader Message SamplingParams Trainer adapt load_adapted load_adapter
    load_base load_template pick_compute prepare save_adapter""".split()


def test_the_names_are_these() -> None:
    assert sorted(alpaca_lora.__all__) == NAMES
    assert set(alpaca_lora._HOMES) == set(NAMES)
    assert len(NAMES) <= 15
    assert set(NAMES) < set(dir(alpaca_lora))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there(name: str) -> None:
    assert getattr(alpaca_lora, name).__name__ == name


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        alpaca_lora.train  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, alpaca_lora; print([m for m in ('torch', 'pydantic', 'rich', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]"
