"""Rank and scale of each module as PEFT reads them, and whose words an error uses."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from alpaca_lora.adapters.lora_config import DEFAULTS, REFUSED, Setting, check_config, settings
from alpaca_lora.errors import AdapterError, ConfigError

NAMES = [f"model.layers.{i}.{part}_proj" for i in (1, 11) for part in ("self_attn.q", "self_attn.v", "mlp.up")]
GOOD: dict[str, Any] = {**DEFAULTS, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "self_attn.q_proj", r"layers\.1\..*", r"model\.layers\.\d+\.mlp.*", "v",
        r"^model\.layers\.1\.mlp\.up_proj", "proj",
    ],
)  # fmt: skip
def test_patterns_match_what_peft_matches(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = {pattern: 3, "up_proj": 5}
    found = settings({**GOOD, "r": 8, "rank_pattern": patterns, "alpha_pattern": patterns}, NAMES)
    for name in NAMES:
        rank = patterns.get(get_pattern_key(list(patterns), name), 8)
        assert found[name] == Setting(rank, 1.0), (pattern, name)  # alpha follows the same pattern


def test_scales() -> None:
    assert settings({**GOOD, "r": 4, "lora_alpha": 2}, ["a"]) == {"a": Setting(4, 0.5)}
    assert settings({**GOOD, "r": 9, "lora_alpha": 2, "use_rslora": True}, ["a"])["a"].scale == 2 / math.sqrt(9)


def test_what_we_write_is_what_peft_knows_and_defaults_to() -> None:
    from peft import LoraConfig

    theirs = LoraConfig().to_dict()
    assert set(DEFAULTS) <= set(theirs)
    # it marks an adapter that was saved
    expected = {key: theirs[key] for key in DEFAULTS} | {"inference_mode": True, "peft_type": "LORA"}
    assert dict(DEFAULTS) == expected


def test_every_key_of_peft_is_known() -> None:
    from peft import LoraConfig

    config = {key: value for key, value in LoraConfig(target_modules=["q_proj"]).to_dict().items()}
    config["target_modules"] = ["q_proj"]
    assert check_config(config) == []
    assert check_config({**config, "novelty": 1}) == ["novelty: unknown key, kept as it is and not used"]


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_the_numbers_is_refused(key: str) -> None:
    with pytest.raises(AdapterError, match=rf"f\.json: {key}: .* is not supported, expected nothing"):
        check_config({**GOOD, key: ["something"]}, file="f.json")


def test_errors_speak_of_flags_to_users_and_of_keys_to_files() -> None:
    with pytest.raises(ConfigError, match=r"^lora_r: is 0, expected a whole number of at least 1"):
        check_config({**GOOD, "r": 0})
    with pytest.raises(AdapterError, match=r"^a\.json: r: is 0"):
        check_config({**GOOD, "r": 0}, file="a.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exclude_modules", 5, "exclude_modules: is 5, expected names or a regular expression"),
        ("exclude_modules", "(", "exclude_modules: '(' is not a regular expression"),
        ("layers_to_transform", "x", "layers_to_transform: is 'x', expected numbers of layers"),
        ("layers_pattern", [5], "layers_pattern: is [5], expected names of lists of layers"),
        ("target_modules", "(q", "target_modules: '(q' is not a regular expression"),
        ("lora_alpha", 1e308, "lora_alpha: is 1e+308, expected a number above 0, at most 1e+06"),
        ("alpha_pattern", {"q_proj": 1e308}, "alpha_pattern: is {'q_proj': 1e+308}, expected a table"),
    ],
)
def test_a_file_s_odd_values_are_named_before_they_are_used(key: str, value: Any, message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        check_config({**DEFAULTS, "target_modules": ["q_proj"], key: value}, file="f.json")
    assert str(caught.value).startswith(f"f.json: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": [f"m{n}" for n in range(5000)]}, "target_modules: has 5000 entries, expected at most 4096"),
        ({"modules_to_save": ["x" * 600]}, "modules_to_save: an entry of 600 characters, expected at most 512"),
        ({"rank_pattern": {f"m{n}": 4 for n in range(5000)}}, "rank_pattern: has 5000 entries"),
        ({"alpha_pattern": {"(a+)+" * 401: 4}}, "alpha_pattern: an entry of 2005 characters"),
        ({"rank_pattern": {r"(.)\1": 4}}, r"rank_pattern: '(.)\\1' is not a regular expression: \1 is not understood"),
        ({"rank_pattern": {f"({'a|' * 250}{n})*": 4 for n in range(4096)}}, "rank_pattern: expressions of module"),
    ],
)  # fmt: skip
def test_a_file_that_would_take_long_is_refused(changes: dict[str, Any], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(AdapterError) as caught:
        check_config({**DEFAULTS, "target_modules": ["q_proj"], **changes}, file="f.json")
    assert str(caught.value).startswith(f"f.json: {message}") and time.monotonic() - started < 20


def test_hostile_patterns_of_ends_take_no_time() -> None:
    started = time.monotonic()
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(100)]
    hostile = {r"([a-z._0-9]*)*!": 4, r"(a|a|.)*!": 2, "self_attn.q_proj": 3}
    found = settings({**GOOD, "r": 8, "rank_pattern": hostile, "alpha_pattern": hostile}, names)
    assert set(found.values()) == {Setting(3, 1.0)} and time.monotonic() - started < 20
