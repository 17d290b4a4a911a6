import pwd
from pathlib import Path
from typing import Any

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


def test_a_user_without_a_home_has_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("ALPACA_LORA_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()
    assert home() == Path("/.cache/alpaca-lora")
    monkeypatch.setenv("ALPACA_LORA_HOME", "~/models")
    assert home() == Path("/models")
