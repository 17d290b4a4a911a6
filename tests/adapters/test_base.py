"""The table of methods: each name leads to a class that keeps the contract."""

from __future__ import annotations

from typing import Any

import pytest

from alpaca_lora.adapters.base import METHODS, Adapter, method_class
from alpaca_lora.errors import ConfigError


def keeps_the_contract(found: Any) -> bool:
    """A class of which objects can be made: nothing of what `Adapter` asks for is left open."""
    return issubclass(found, Adapter) and not found.__abstractmethods__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name: str) -> None:
    found = method_class(name)
    assert keeps_the_contract(found) and found.method == name and found.peft_type


def test_a_class_that_leaves_something_open_is_noticed() -> None:
    class Half(method_class("lora")):
        _moved = Adapter._moved

    assert not keeps_the_contract(Half) and not keeps_the_contract(Adapter) and not keeps_the_contract(dict)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"method: unknown method 'lara'.*did you mean 'lora'"):
        method_class("lara")
