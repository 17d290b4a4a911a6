"""What a user's words for targets mean, on our decoder and on any module; nothing unmatched passes."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch import nn

from alpaca_lora.adapters.targets import find_targets, linear_names, peft_spec, peft_targets
from alpaca_lora.errors import AdapterError, ConfigError
from tests.tiny import tiny_model

QV = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (["q_proj", "v_proj"], QV),
        (["v_proj", "q_proj", "q_proj"], QV),  # the model's order, each once
        (["layers.1.self_attn.q_proj"], QV[2:3]),
        (["model.layers.0.self_attn.v_proj"], QV[1:2]),
        (r".*\.(q|v)_proj", QV),
        ([r".*\.(q|v)_proj"], QV),
        ([r"model\.layers\.0\..*(q|v)_proj", "layers.1.self_attn.v_proj"], [QV[0], QV[1], QV[3]]),
        ("q_proj", [QV[0], QV[2]]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_names_suffixes_and_expressions(model: nn.Module, spec: list[str] | str, expected: list[str]) -> None:
    assert find_targets(model, spec) == expected


def test_all_linear_is_every_linear_but_the_head(model: nn.Module) -> None:
    found = find_targets(model, "all-linear")
    assert found == find_targets(model, ["all-linear"])
    assert len(found) == 2 * 7 and "lm_head" not in found
    assert set(linear_names(model)) - set(found) == {"lm_head"}


def test_a_suffix_is_a_whole_part_of_the_name() -> None:
    # "proj" is the end of "q_proj" as text but not as a name
    with pytest.raises(ConfigError, match="'proj' matches nothing"):
        find_targets(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), ["proj"])


def test_everything_unmatched_is_listed_with_the_nearest_names(model: nn.Module) -> None:
    with pytest.raises(ConfigError) as caught:
        find_targets(model, ["q_proj", "w_proj", "query_key_value", "o_prj"])
    message = str(caught.value)
    assert caught.value.exit_code == 2 and message.startswith("lora_target_modules: ")
    assert "'w_proj' matches nothing" in message and "'o_prj' matches nothing (nearest: o_proj" in message
    assert "'query_key_value'" in message and "'q_proj'" not in message


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ([r".*\.(x|y)_proj"], "matches nothing"),
        (["("], r"not a regular expression"),
        (["self_attn"], "Attention and not a linear"),
        (["embed_tokens"], "not a linear"),
        ([], "names no linear"),
    ],
)
def test_what_names_no_linear_is_an_error(model: nn.Module, spec: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        find_targets(model, spec)


def test_a_tied_head_says_why_it_cannot_be_a_target() -> None:
    with pytest.raises(ConfigError, match=r"tied"):
        find_targets(tiny_model(tie_word_embeddings=True), ["lm_head"])


def test_plain_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert find_targets(net, "all-linear") == ["0", "2"]
    assert find_targets(net, ["2"]) == ["2"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        ([r".*\.(q|v)_proj", "o_proj"], ["o_proj", "q_proj", "v_proj"]),
        ([r".*1.*\.q_proj", "o_proj"], ["model.layers.1.self_attn.q_proj", "o_proj"]),
        ([".*self_attn.*"], ["k_proj", "o_proj", "q_proj", "v_proj"]),  # matches the block itself too
        ([r".*0\.mlp\..*"], [f"model.layers.0.mlp.{p}_proj" for p in ("down", "gate", "up")]),
        (["all-linear"], sorted(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"])),
    ],
)
def test_peft_is_told_names_that_mean_the_same_to_it(
    model: nn.Module, spec: list[str], expected: list[str] | str
) -> None:
    targets = find_targets(model, spec)
    written = peft_spec(model, spec, targets)
    assert written == expected
    assert peft_targets(model, {"target_modules": written}) == (targets, [])


def test_layers_and_exclusions_of_peft_files(model: nn.Module) -> None:
    def names(**config: object) -> list[str]:
        return peft_targets(model, {"target_modules": ["q_proj", "v_proj"], **config})[0]

    assert names(layers_to_transform=[1]) == QV[2:]
    assert names(layers_to_transform=0, layers_pattern="layers") == QV[:2]
    assert names(exclude_modules=["v_proj"]) == [QV[0], QV[2]]
    assert names(exclude_modules=r".*\.1\..*") == QV[:2]


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ATTENTION},
        {"target_modules": "q_proj|.*up_proj"},
        {"target_modules": r".*\.(1|10)\..*\.(q|up)_proj"},
        {"target_modules": r"model\.layers\.(?!0\.).*_proj"},
        {"target_modules": ["lm_head", "self_attn.q_proj", "model.layers.3.mlp.up_proj"]},
        {"target_modules": ATTENTION, "exclude_modules": r".*layers\.[0-4]\..*"},
        {"target_modules": ATTENTION, "exclude_modules": ["q_proj", "layers.0.self_attn.k_proj"]},
        {"target_modules": ATTENTION, "layers_to_transform": 1},
        {"target_modules": ATTENTION, "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ATTENTION, "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["model.layers.3.mlp.up_proj", "q_proj"], "layers_to_transform": [0]},
    ],
)  # fmt: skip
def test_as_peft_chooses(config: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model = tiny_model(num_layers=12)
    theirs = LoraConfig(**config)
    expected = [name for name in linear_names(model) if check_target_module_exists(theirs, name)]
    assert expected and peft_targets(model, config) == (expected, [])


HOSTILE = [r"(a+)+$", r"(([a-z._0-9]*)*)*!", r"(.*.*.*.*.*.*.*.*.*.*)*!", "(a|a)" * 80 + "!", r"(.*_?)+x{9}"]


@pytest.mark.parametrize("expression", HOSTILE)
def test_an_expression_that_backtracks_for_years_takes_no_time(expression: str) -> None:
    """For `re`, each of them does with names such as ours; the user's own are matched by the same engine."""
    model, started = tiny_model(num_layers=12), time.monotonic()
    for config in ({"target_modules": expression}, {"target_modules": [expression, "q_proj"]}):
        names, problems = peft_targets(model, config, file="f.json")
        assert len(names) in (0, 12) and "matches nothing" in problems[0]
    assert len(peft_targets(model, {"target_modules": ["q_proj"], "exclude_modules": expression})[0]) == 12
    with pytest.raises(ConfigError, match="matches nothing"):
        find_targets(model, [expression])
    assert time.monotonic() - started < 20


def test_lists_of_layers_have_plain_names(model: nn.Module) -> None:
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": r"(a*)*"}
    with pytest.raises(AdapterError, match=r"f\.json: layers_pattern: '\(a\*\)\*' is not the name of a list of layers"):
        peft_targets(model, config, file="f.json")


def test_thousands_of_wrong_names_are_told_quickly(model: nn.Module) -> None:
    started = time.monotonic()
    names, problems = peft_targets(model, {"target_modules": [f"k_proj{n}" for n in range(4000)]})
    assert names == [] and len(problems) == 4000 and time.monotonic() - started < 20
    assert "nearest: k_proj" in problems[0] and problems[-1] == "'k_proj3999' matches nothing"
