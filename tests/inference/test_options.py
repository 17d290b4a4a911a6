"""The keys of answering that only make sense together."""

from __future__ import annotations

import pytest

from alpaca_lora.commands.schemas import GenerateConfig
from alpaca_lora.config import resolve
from alpaca_lora.errors import ConfigError


def test_an_input_without_a_prompt_is_an_error() -> None:
    flags = ["--base_model", "m", "--input", "Good day"]
    with pytest.raises(ConfigError, match="--input: input is given without a prompt, expected prompt with it"):
        resolve(GenerateConfig, flags, "generate")
    assert resolve(GenerateConfig, [*flags, "--prompt", "Translate."], "generate").value.input == "Good day"
    assert resolve(GenerateConfig, flags[:2], "generate").value.input == ""
