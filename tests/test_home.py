from pathlib import Path

import pytest

from alpaca_lora.home import home


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_LORA_HOME", "~/models")
    assert home() == Path.home() / "models"
    monkeypatch.delenv("ALPACA_LORA_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "alpaca-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "alpaca-lora"
