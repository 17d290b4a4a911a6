"""The same linears, ranks and alphas as PEFT's rules give, without an expression left."""

from __future__ import annotations

from typing import Any

import pytest

from alpaca_lora.adapters import adalora_config, lora_config
from alpaca_lora.adapters.lora_config import DEFAULTS, check_config, settings
from alpaca_lora.adapters.targets import peft_targets
from alpaca_lora.errors import AdapterError
from alpaca_lora.inference.adapter_targets import AdapterTargets
from alpaca_lora.models.decoder import CausalLM
from tests.tiny import tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model(num_layers=12)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ATTENTION},
        {"target_modules": "all-linear"},
        {"target_modules": ["all-linear"]},
        {"target_modules": "q_proj|.*up_proj"},
        {"target_modules": r".*\.(1|10)\..*\.(q|up)_proj"},
        {"target_modules": [r".*\.1\..*_proj", "o_proj", "query"]},
        {"target_modules": ["lm_head", "self_attn.q_proj", "model.layers.3.mlp.up_proj"]},
        {"target_modules": ATTENTION, "exclude_modules": r".*layers\.[0-4]\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ATTENTION, "layers_to_transform": 1},
        {"target_modules": ATTENTION, "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ATTENTION, "layers_to_transform": [2], "layers_pattern": ["h", "model.layers"]},
        {"target_modules": ["model.layers.3.mlp.up_proj", "q_proj"], "layers_to_transform": [0]},
        {"target_modules": r".*q_proj", "layers_to_transform": [0]},
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, r".*\.1\..*": 3, "k_proj": 4}},
        {
            "target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {r"^model\.layers\.(1|2)\..*": 5},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "[kv]_proj": 7, "attn.o_proj": 9},
        },
    ],
)  # fmt: skip
def test_as_peft(model: CausalLM, changes: dict[str, Any]) -> None:
    config = {**DEFAULTS, "r": 8, **changes}
    expected, problems = peft_targets(model, config)
    found = AdapterTargets.find(model, config, check_config, file="f")
    assert found.names == expected and len(found.messages) == len(problems)
    assert peft_targets(model, found.config) == (expected, [])
    assert settings(found.config, expected) == settings(config, expected)
    assert check_config(found.config, file="f") == []


def test_adalora_s_masks_stay(model: CausalLM) -> None:
    masks = {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}
    config = {
        **DEFAULTS, "peft_type": "ADALORA", "init_r": 2, "target_r": 1, "target_modules": ["q_proj"],
        "rank_pattern": masks,
    }  # fmt: skip
    found = AdapterTargets.find(model, config, adalora_config.check_config, file="f")
    assert found.config["rank_pattern"] == masks and len(found.names) == 12


def test_wrong_types_are_the_method_s_to_name(model: CausalLM) -> None:
    for changes in ({"target_modules": 5}, {"target_modules": [5]}, {"layers_to_transform": 1.5}, {"alpha_pattern": 3}):
        with pytest.raises(AdapterError, match=next(iter(changes))):
            AdapterTargets.find(model, {**DEFAULTS, "target_modules": ["q_proj"], **changes}, check_config, file="f")


def test_no_more_than_ten_entries_are_told(model: CausalLM) -> None:
    config = {**DEFAULTS, "target_modules": ["q_proj", *(f"m{n}" for n in range(4000))]}
    found = AdapterTargets.find(model, config, lora_config.check_config, file="f")
    assert len(found.messages) == 10 and "'m0' matches nothing" in found.messages[0]
