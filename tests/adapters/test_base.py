"""The table of methods: each name leads to a class that keeps the contract."""

from __future__ import annotations

import pytest

from alpaca_lora.adapters.base import METHODS, Adapter, method_class
from alpaca_lora.errors import ConfigError


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    found = method_class(name)
    assert found.method == name and found.peft_type
    asked = {member for member in vars(Adapter) if not member.startswith("_")}
    assert asked <= {member for member in dir(found)}


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"method: unknown method 'lara'.*did you mean 'lora'"):
        method_class("lara")
