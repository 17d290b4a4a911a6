"""The adapter's options refuse what cannot be (fault case 5)."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from alpaca_lora.adapters.options import AdapterOptions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_r", 0), ("lora_r", 2.5), ("lora_alpha", float("nan")), ("lora_alpha", 0), ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_target_modules", []), ("lora_rank", 8),
    ],
)  # fmt: skip
def test_impossible_values(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        AdapterOptions(**{key: value})  # pyright: ignore[reportArgumentType]


def test_the_reference_recipe_is_the_default() -> None:
    reference = {
        "method": "lora", "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"], "use_rslora": False,
    }  # fmt: skip
    defaults = AdapterOptions().model_dump()
    assert {key: defaults[key] for key in reference} == reference


def test_one_string_is_a_list_of_one() -> None:
    assert AdapterOptions(lora_target_modules="all-linear").lora_target_modules == ["all-linear"]  # pyright: ignore[reportArgumentType]
