"""Which linear gets which scheme: entries of a file, the first that fits; what cannot be is one error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from alpaca_lora.commands.schemas import QuantizeConfig
from alpaca_lora.errors import ConfigError, ModelFileError
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.plan import Plan, linear_shapes, scheme_settings
from tests.tiny import tiny_model

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GOOD = """# comment
plan:
  - modules: [down_proj, 'model\\.layers\\.0\\.self_attn\\.[qk]_proj']
    scheme: int8
  - modules: model.layers.1.self_attn.o_proj
    scheme: dense
  - modules: [all-linear]
    scheme: nf4
    block_size: 32
"""


def written(folder: Path, content: Any, name: str = "plan.yml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def schemes_of(plan: Plan) -> dict[str, str]:
    return {name: scheme.name for name, scheme in plan.schemes.items()}


def test_uniform_is_every_linear_but_the_head() -> None:
    plan = Plan.uniform(tiny_model(), "nf4", {"block_size": 32})
    assert len(plan.schemes) == 2 * len(KINDS) and "lm_head" not in plan.schemes
    assert set(plan.schemes.values()) == {NF4(block_size=32)}
    assert list(plan.schemes) == [name for name in linear_shapes(tiny_model()) if name != "lm_head"]


def test_a_group_size_that_nobody_gave_is_fitted() -> None:
    plan = Plan.uniform(tiny_model(), "int4")  # 32 inputs, 48 for down_proj
    sizes = {name.rpartition(".")[2]: scheme.group_size for name, scheme in plan.schemes.items()}  # pyright: ignore
    assert sizes == {**dict.fromkeys(KINDS, 32), "down_proj": 16}
    with pytest.raises(ConfigError, match=r"^group_size: model\.layers\.0\.mlp\.down_proj: 32 does not divide the 48 "):
        Plan.uniform(tiny_model(), "int4", {"group_size": 32})


def test_the_first_entry_that_fits_decides(tmp_path: Path) -> None:
    plan = Plan.from_file(tiny_model(), written(tmp_path, GOOD))
    found = schemes_of(plan)
    assert "model.layers.1.self_attn.o_proj" not in found and "lm_head" not in found
    int8 = {name for name, scheme in found.items() if scheme == "int8"}
    assert int8 == {
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    }  # fmt: skip
    assert set(found.values()) == {"int8", "nf4"} and len(found) == 13
    assert plan.schemes["model.layers.1.self_attn.q_proj"] == NF4(block_size=32)


def test_json_says_the_same_and_the_head_can_be_named(tmp_path: Path) -> None:
    entries = [
        {"modules": ["down_proj", r"model\.layers\.0\.self_attn\.[qk]_proj"], "scheme": "int8"},
        {"modules": "model.layers.1.self_attn.o_proj", "scheme": "dense"},
        {"modules": "all-linear", "scheme": "nf4", "block_size": 32},
    ]
    model = tiny_model()
    plan = Plan.from_file(model, written(tmp_path, {"plan": entries}, "plan.json"))
    assert plan.digest() == Plan.from_file(model, written(tmp_path, GOOD)).digest()
    with_head = Plan.from_file(model, written(tmp_path, "plan:\n- {modules: lm_head, scheme: int8}\n"))
    assert schemes_of(with_head) == {"lm_head": "int8"}


def test_entries_give_the_plan_back(tmp_path: Path) -> None:
    model = tiny_model()
    plan = Plan.from_file(model, written(tmp_path, GOOD))
    entries = json.loads(json.dumps(plan.to_entries()))
    assert [entry["scheme"] for entry in entries] == ["int8", "nf4"]  # grouped
    for again in (
        Plan.from_stored(model, entries, file="f"), Plan.from_entries(model, entries, file="f"),
        Plan.from_entries(model, entries[::-1], file="f"),
    ):  # fmt: skip
        assert again == plan and again.digest() == plan.digest() and list(again.schemes) == list(plan.schemes)


def test_every_setting_counts_in_the_digest() -> None:
    model = tiny_model()
    plans = [
        Plan.uniform(model, "nf4"),
        Plan.uniform(model, "nf4", {"double_quant": False}),
        Plan.uniform(model, "fp4"),
    ]
    assert len({plan.digest() for plan in plans}) == 3
    fewer = dict(plans[0].schemes)
    fewer.popitem()
    assert Plan(fewer).digest() != plans[0].digest()
    assert Plan(dict(reversed(list(plans[0].schemes.items())))).digest() == plans[0].digest()


def test_bits_and_table() -> None:
    model = tiny_model()
    shapes = linear_shapes(model)
    # of out x in weights: 8 bits each and 32 for each output; or 4 bits each, 24 for each group of 16
    int8 = Plan({"model.layers.0.mlp.up_proj": Int8()})
    assert int8.bits_per_weight(shapes) == 8 + 32 / 32
    both = Plan({**int8.schemes, "model.layers.0.self_attn.q_proj": Int4(group_size=16)})
    assert both.bits_per_weight(shapes) == pytest.approx((48 * 32 * 9 + 32 * 32 * (4 + 24 / 16)) / (48 * 32 + 32 * 32))
    assert both.summary(shapes) == f"int8, int4, {both.bits_per_weight(shapes):.2f} bits per weight"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(both.table(shapes, dense_bits=32))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "up_proj 1 int8 9.00 0.0 MB" in rows
    assert any(row == "q_proj 1 int4 (group_size 16) 5.50 0.0 MB" for row in rows)
    assert any("lm_head" in row and row.endswith("dense 32.00 0.1 MB") for row in rows)


def test_of_a_packed_model() -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj"
    linear: Any = model.get_submodule(name)
    model.get_submodule("model.layers.1.mlp").up_proj = QuantizedLinear.from_dense(linear, Int8(), name=name)  # pyright: ignore
    assert Plan.of(model) == Plan({name: Int8()}) and name in linear_shapes(model)
    assert torch.equal(torch.tensor(linear_shapes(model)[name]), torch.tensor([48, 32]))


def test_what_needs_rows() -> None:
    model = tiny_model()
    assert Plan.uniform(model, "int8").made_on_rows() is None
    assert Plan.uniform(model, "int8_static").made_on_rows() == "model.layers.0.self_attn.q_proj"


def test_settings_of_the_options() -> None:
    asked: dict[str, Any] = {"base_model": "m", "output_dir": "o", "calibration_data": "c"}
    given = QuantizeConfig(**asked, scheme="fp8", fp8_format="e5m2")
    assert scheme_settings(given) == {"format": "e5m2"}
    given = QuantizeConfig(**asked, scheme="int8_static", observer="percentile", percentile=99.0)
    assert scheme_settings(given) == {"observer": "percentile", "percentile": 99.0}
    assert scheme_settings(QuantizeConfig(**asked, scheme="nf4", double_quant=False)) == {"double_quant": False}


# ---- what cannot be

NO_LIST = "is something else, expected `plan:` and a list of mappings"
WRONG_YAML = {
    "": NO_LIST,
    "plan: nf4": f"1: {NO_LIST}",
    "layers:\n- {modules: q_proj, scheme: nf4}": f"1: {NO_LIST}",
    "- {modules: q_proj, scheme: nf4}": f"1: {NO_LIST}",
    "plan:\n- q_proj": f"2: {NO_LIST}",
    "plan: []": "plan: names no layer, expected a list of entries",
    "plan:\n- {modules: q_proj, scheme: nf4}\nmore: 1": "3: a second key, expected `plan:` and nothing else",
    "plan:\n- modules: norm\n  scheme: nf4\n": "2: plan[0].modules: 'norm' names no linear of this model",
    "plan:\n\n- {modules: q_proj, scheme: nf4}\n- {modules: up_porj, scheme: nf4}": "4: plan[1].modules: 'up_porj' "
    "names no linear of this model, expected names of linears, or all-linear, nearest: up_proj",
    "plan:\n- {modules: all-linear, scheme: dense}": "plan: leaves every layer dense, expected a scheme for some layer",
}  # fmt: skip
WRONG_ENTRIES = {
    "modules: q_proj, scheme: nf4, scheme: int8": "scheme: given twice, on line 2 and on line 2",
    "modules: q_proj": "plan[0]: is no entry, expected an object with modules and scheme",
    "modules: [], scheme: nf4": "plan[0].modules: names no layer, expected names of linears, or all-linear",
    "modules: 'q_(proj', scheme: nf4": "plan[0].modules: 'q_(proj' is not a regular expression: ",
    "modules: q_proj, scheme: nf5": "plan[0].scheme: unknown scheme 'nf5', expected one of nf4, fp4, fp8, int8, int4, "
    "int8_dynamic, int8_static; did you mean 'nf4'?",
    "modules: q_proj, scheme: 4": "plan[0].scheme: names no scheme, expected the name of a scheme",
    "modules: q_proj, scheme: int8, bits: 8": "plan[0].bits: unknown setting of int8, expected one of none",
    "modules: q_proj, scheme: nf4, block_size: big": "plan[0].block_size: is 'big', expected int",
    "modules: q_proj, scheme: nf4, block_size: 48": "plan[0].block_size: is 48, expected a power of two",
    "modules: q_proj, scheme: int4, group_size: 24": "plan[0].group_size: model.layers.0.self_attn.q_proj: 24 does not "
    "divide the 32 inputs of a linear of 32 x 32, nearest: 8, 16, 32",
    "modules: &a q_proj, scheme: *a": "scheme: alias *a: aliases are not read",
}  # fmt: skip
ALL_WRONG = WRONG_YAML | {f"plan:\n- {{{entry}}}": f"2: {says}" for entry, says in WRONG_ENTRIES.items()}


@pytest.mark.parametrize("content", ALL_WRONG, ids=range(len(ALL_WRONG)))
def test_a_wrong_plan_names_file_line_and_entry(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    says = ALL_WRONG[content]
    separator = ":" if says[0].isdigit() else ": "
    with pytest.raises(ConfigError) as caught:
        Plan.from_file(tiny_model(), path)
    assert str(caught.value).startswith(f"{path}{separator}{says}")


def test_json_that_is_no_plan(tmp_path: Path) -> None:
    for content, says in (
        ("{", r"plan\.json:1: is not JSON"), ("[]", r"plan\.json: is not a JSON object"),
        ({"plam": []}, r"plan\.json: plan: names no layer, expected a list of entries"),
        ({"plan": [{"modules": "q_porj", "scheme": "nf4"}]}, r"plan\.json: plan\[0\]\.modules: 'q_porj' names no"),
        ({"plan": [[]]}, r"plan\.json: plan\[0\]: is no entry"),
        ({"plan": [{"modules": [1], "scheme": "nf4"}]}, r"plan\.json: plan\[0\]\.modules: names no layer"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            Plan.from_file(tiny_model(), written(tmp_path, content, "plan.json"))
    with pytest.raises(ConfigError, match=r"^plan: there is no file '.*nowhere\.yml', expected a YAML or JSON file"):
        Plan.from_file(tiny_model(), tmp_path / "nowhere.yml", field="plan")


def test_a_stored_plan_holds_names_and_no_patterns() -> None:
    model = tiny_model()
    for word in ("q_proj", "all-linear", "(a+)+b", "model.layers.2.mlp.up_proj"):
        with pytest.raises(
            ModelFileError, match=r"^f: plan\[0\]\.modules: '.*' names no linear of this model, expected"
        ):
            Plan.from_stored(model, [{"modules": [word], "scheme": "int8"}], file="f")
    with pytest.raises(ModelFileError, match=r"^f: plan: names no layer"):
        Plan.from_stored(model, None, file="f")
    with pytest.raises(ModelFileError, match=r"^f: plan\[0\]\.scheme: unknown scheme 'nf3'"):
        Plan.from_stored(model, [{"modules": ["lm_head"], "scheme": "nf3"}], file="f")
