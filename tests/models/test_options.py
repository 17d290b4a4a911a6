"""The model's keys of the configuration, and that reading them costs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from alpaca_lora.models.options import ModelOptions


def test_only_the_base_model_is_required() -> None:
    options = ModelOptions(base_model="smollm2-135m")
    assert (options.dtype, options.device, options.num_threads) == ("auto", "auto", 0)
    with pytest.raises(ValidationError, match="base_model"):
        ModelOptions()  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValidationError, match="num_threads"):
        ModelOptions(base_model="m", num_threads=-1)


def test_options_do_not_import_torch() -> None:
    program = "import sys, alpaca_lora.models.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
