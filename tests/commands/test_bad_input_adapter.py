"""Wrong adapters, merges and checkpoints through the command (fault cases 18, 28 to 33, 43, 44): what, where, and
nothing lost.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.conftest import Canary, Program, Write, alpaca_lines, edit_json, snapshot, write_base

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "alpaca_lora.json"
FILES = (WEIGHTS, CONFIG, RECORD)
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """The trained adapter, to be broken."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in FILES:
        shutil.copy(trained / name, folder)
    return folder


@pytest.fixture
def plain(adapter: Path) -> Path:
    """The same without our record, as PEFT would write it."""
    (adapter / RECORD).unlink()
    return adapter


@pytest.fixture(scope="session")
def wider_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "wider", hidden_size=48, head_dim=12)


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def silence(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


# --- 28, 29: does not fit --------------------------------------------------------------------------------------------


def test_28_another_base_is_refused_with_both_fingerprints(program: Program, adapter: Path, wider_base: Path) -> None:
    trained_on = json.loads((adapter / RECORD).read_text())["base_fingerprint"]
    says = (f"{adapter / RECORD}: base_fingerprint: trained on another base model: {program.base} with fingerprint",
            trained_on, ", this one has ", "give the base model that the adapter was trained on")  # fmt: skip
    for command in ("generate", "merge"):
        done = program.refuses(command, 2, *says, lora_weights=adapter, base_model=wider_base)
        assert done.result["error"]["message"].count(trained_on) == 1
    edit_json(adapter / RECORD, base_fingerprint="0" * 64)
    program.refuses("generate", 2, "0" * 64, trained_on, lora_weights=adapter)


def test_28_an_adapter_of_another_size_says_the_shapes(program: Program, plain: Path, wider_base: Path) -> None:
    says = (f"{plain / WEIGHTS}: does not fit the base model", f"{A} has shape (4, 32), expected (4, 48)")
    program.refuses("generate", 2, *says, lora_weights=plain, base_model=wider_base)


KEYS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(A), f"missing {A}"),
    "extra": (
        lambda t: t.update({A.replace("q_", "k_"): torch.ones(4, 32)}),
        f"unexpected {A.replace('q_', 'k_')} (near",
    ),
    "renamed": (
        lambda t: t.update({A.replace("_A", "_a"): t.pop(A)}),
        f"missing {A} (nearest: {A.replace('_A', '_a')})",
    ),
    "called lora": (lambda t: t.update({A.replace("q_proj", "lora"): t.pop(A)}), f"missing {A}"),
    "leads out": (lambda t: t.update({"../../x": t.pop(A)}), "unexpected ../../x"),
    "shape": (lambda t: t.update({A: t[A][:3].clone()}), f"{A} has shape (3, 32), expected (4, 32)"),
    "none": (lambda t: t.clear(), "holds no tensors, expected 8 of them"),
}


@pytest.mark.parametrize("case", KEYS)
def test_29_keys_and_shapes(program: Program, plain: Path, case: str) -> None:
    change, says = KEYS[case]
    change_tensors(plain, change)
    for command in ("generate", "merge"):
        program.refuses(command, 2, f"{plain / WEIGHTS}: ", says, lora_weights=plain)


# --- 31, 32: adapter_config.json -------------------------------------------------------------------------------------

CONFIGS = {
    "31 unknown type": ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is not supported, expected one of LORA"),
    "31 no type": ({"peft_type": ...}, "peft_type: missing, expected one of LORA"),
    "32 bias": ({"bias": "all"}, "bias: 'all' is not supported, expected none"),
    "32 pissa": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights: 'pissa' takes a part out of the base",
        "convert it",
    ),
    "rank 0": ({"r": 0}, "r: is 0, expected a whole number of at least 1"),
    "rank text": ({"r": "8"}, "r: is '8', expected a whole number"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha: is '16', expected a number above 0"),
    "alpha endless": ({"lora_alpha": 1e308}, "lora_alpha: is 1e+308, expected a number above 0, at most 1e+06"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 1e308}}, "alpha_pattern: is {'q_proj': 1e+308}"),
    "rank pattern": ({"rank_pattern": {"(q": 4}}, "rank_pattern: '(q' is not a regular expression"),
    "no targets": ({"target_modules": ...}, "target_modules: is None, expected names or a regular expression"),
    "odd targets": ({"target_modules": [5]}, "target_modules: is [5], expected names or a regular expression"),
    "bad expression": ({"target_modules": "(q"}, "target_modules: '(q' is not a regular expression"),
    "unknown targets": ({"target_modules": ["q_prj"]}, "target_modules: 'q_prj' matches nothing (nearest: q_proj"),
    "odd layers": ({"layers_to_transform": "x"}, "layers_to_transform: is 'x', expected numbers of layers"),
    "no such layer": ({"layers_to_transform": [7]}, "target_modules: names no linear of this model"),
    "layer pattern": (
        {"layers_to_transform": [0], "layers_pattern": "("},
        "layers_pattern: '(' is not the name of a list",
    ),
    "odd exclusion": ({"exclude_modules": 5}, "exclude_modules: is 5, expected names or a regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_31_and_32_a_configuration_that_cannot_be_served(program: Program, plain: Path, case: str) -> None:
    changes, *says = CONFIGS[case]
    edit_json(plain / CONFIG, **changes)
    program.refuses("generate", 2, f"{plain / CONFIG}: {says[0]}", *says[1:], lora_weights=plain)


def test_31_unknown_keys_are_told_and_kept(program: Program, plain: Path) -> None:
    edit_json(plain / CONFIG, zork=1)
    done = program("generate", lora_weights=plain)
    assert done.code == 0 and "zork: unknown key, kept as it is and not used" in done.err


# --- damaged files ---------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[str, str | bytes | None, int, str]] = {
    "no config": (CONFIG, None, 2, ": no adapter_config.json, expected an adapter folder with adapter_config.json and"),
    "no weights": (WEIGHTS, None, 2, ": no adapter_model.safetensors, expected a complete adapter folder"),
    "config": (CONFIG, "{", 3, "/adapter_config.json: not JSON"),
    "config, Latin-1": (CONFIG, b'{"a": "\xe9"}', 3, "/adapter_config.json: not JSON"),
    "config, list": (CONFIG, "[]", 3, "/adapter_config.json: not a JSON object"),
    "config, nested": (CONFIG, "[" * 100_000, 3, "/adapter_config.json: not JSON"),
    "weights": (WEIGHTS, b"\xff" * 100, 3, "/adapter_model.safetensors: header of 18446744073709551615 bytes"),
    "record": (RECORD, "{", 3, "/alpaca_lora.json: not JSON", ),
    "record, nested": (RECORD, "[" * 100_000, 3, "/alpaca_lora.json: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_names_its_file(program: Program, adapter: Path, case: str) -> None:
    name, content, code, says = DAMAGE[case]
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("generate", "merge"):
        program.refuses(command, code, f"{adapter}{says}", lora_weights=adapter)


RECORDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown field": ({"zork": 1}, 3, "zork: unknown field, remove the file"),
    "newer": ({"format_version": 99}, 3, "format_version: format 99 is newer than this program, expected at most 1"),
    "wrong type": ({"stop_ids": ["a"]}, 3, "stop_ids: wrong value \"['a']\", expected list of int"),
    "no fingerprint": ({"base_fingerprint": ...}, 3, "base_fingerprint: missing"),
    "template kind": ({"template": {"kind": "x"}}, 2, "template.kind: unknown kind 'x', expected instruction or chat"),
    "template type": ({"template": {"kind": "chat", "name": 5}}, 2, "template.name: is 5, expected text"),
    "template part": ({"template": {"kind": "chat"}}, 2, "template: lacks 'chat_template', take the adapter from its"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_not_ours_names_its_field(program: Program, adapter: Path, case: str) -> None:
    changes, code, says = RECORDS[case]
    edit_json(adapter / RECORD, **changes)
    program.refuses("generate", code, f"{adapter / RECORD}: {says}", lora_weights=adapter)


def test_a_template_that_was_changed_is_not_run(program: Program, adapter: Path) -> None:
    template = json.loads((adapter / RECORD).read_text())["template"]
    edit_json(adapter / RECORD, template={**template, "chat_template": "{{ raise_exception('it ran') }}"})
    says = f"{adapter / RECORD}: template: does not match its sha256, take the adapter from its source again"
    program.refuses("generate", 2, says, lora_weights=adapter)


def test_25_a_pickled_adapter_is_not_run(program: Program, adapter: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    for command in ("generate", "merge"):
        says = (
            "adapter_model.bin: holds its weights as a pickle only",
            "never read",
            "load it with PEFT and save it again",
        )
        program.refuses(command, 2, *says, lora_weights=adapter)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no such folder"),
        ("rows.jsonl", "is not a folder"),
        (".", "no adapter_config.json"),
        ("a" * 300, "no such"),
    ],
)
def test_what_is_no_adapter(program: Program, tmp_path: Path, name: str, says: str) -> None:
    for command in ("generate", "merge"):
        program.refuses(command, 2, says, "expected an adapter folder with", lora_weights=tmp_path / name)
    program.refuses("generate", 2, "no adapter_config.json", lora_weights=program.base)


# --- 30, 33: values, and what may be published -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_33_weights_that_are_not_finite(program: Program, plain: Path, value: float) -> None:
    change_tensors(plain, lambda tensors: tensors[A].__setitem__((0, 0), value))
    for command in ("generate", "merge"):
        program.refuses(command, 5, f"{plain / WEIGHTS}: {A}: holds NaN or Inf", lora_weights=plain)


def test_33_integers(program: Program, plain: Path) -> None:
    change_tensors(plain, lambda tensors: tensors.update({A: tensors[A].int()}))
    says = f"{plain / WEIGHTS}: {A}: is stored as int32, expected floating point numbers"
    program.refuses("generate", 3, says, lora_weights=plain)


def test_33_weights_that_were_changed_since(program: Program, adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors[A].add_(1))
    says = f"{adapter / WEIGHTS}: is not the file that alpaca_lora.json was written for"
    program.refuses("generate", 3, says, "save it again", lora_weights=adapter)


def test_33_a_merge_that_overflows_writes_nothing(program: Program, plain: Path, tmp_path: Path) -> None:
    change_tensors(plain, lambda tensors: tensors[A].fill_(3e38))
    program.refuses(
        "merge", 5, "model.layers.0.self_attn.q_proj: the merged weight holds NaN or Inf", lora_weights=plain
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "rows.jsonl"]


def test_33_an_adapter_is_merged_once(program: Program, adapter: Path, tmp_path: Path) -> None:
    assert program("merge", lora_weights=adapter).code == 0
    merged = snapshot(tmp_path / "merged")
    again = {"lora_weights": adapter, "base_model": tmp_path / "merged", "output_dir": tmp_path / "twice"}
    program.refuses("merge", 2, "base_fingerprint: trained on another base model", **again)
    program.refuses("merge", 2, f"{tmp_path / 'merged'}: exists already, give another name", lora_weights=adapter)
    assert snapshot(tmp_path / "merged") == merged and not (tmp_path / "twice").exists()


def test_30_an_adapter_that_changes_nothing_is_not_published(program: Program, plain: Path) -> None:
    change_tensors(plain, silence)
    program.refuses("merge", 2, "the adapter changes nothing: every update is zero", lora_weights=plain)
    done = program("generate", lora_weights=plain)
    assert done.code == 0 and "the adapter changes nothing: every lora_B is zero" in done.err


def test_30_a_run_that_moved_nothing_ends_without_an_adapter(program: Program, tmp_path: Path) -> None:
    done = program("finetune", learning_rate=1e-30)
    assert done.code == 5 and "4 modules did not move in 2 steps" in done.result["error"]["message"]
    assert done.err.count("error: ") == 1 and not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl/below", "a" * 300])
def test_a_merge_into_what_cannot_be_a_folder(program: Program, adapter: Path, tmp_path: Path, name: str) -> None:
    before = snapshot(program.rows)
    program.refuses("merge", 2, str(tmp_path), lora_weights=adapter, output_dir=tmp_path / name)
    assert snapshot(program.rows) == before


# --- 18, 43, 44: going on with a run ---------------------------------------------------------------------------------


@pytest.fixture
def resumed(program: Program, trained: Path, tmp_path: Path) -> Callable[..., None]:
    """refuse(code, *says, **options): going on with a copy of the run is refused, and the copy is as it was."""
    shutil.copytree(trained, tmp_path / "out")

    def refuse(code: int, *says: str, **options: Any) -> None:
        program.refuses("finetune", code, *says, **{"resume_from_checkpoint": "auto", **options})

    return refuse


Refuse = Callable[..., None]
CHANGED = {
    "44 rank": ({"lora_r": 8}, 2, "lora_r: 4 in the checkpoint, 8 now", "give the values of the checkpoint"),
    "44 several": (
        {"seed": 1, "batch_size": 2},
        2,
        "batch_size: 4 in the checkpoint, 2 now; seed: 42 in the checkpoint",
    ),
    "44 template": (
        {"prompt_template_name": "alpaca"},
        2,
        "the template is not the checkpoint's: fingerprint",
        "--fresh",
    ),
    "18 other rows": (
        {"data_path": "other.jsonl"},
        3,
        "other.jsonl: data_path: changed since the checkpoint: sha256",
        "as it was",
    ),
    "18 rows gone": ({"data_path": "gone.jsonl"}, 2, "gone.jsonl: data_path: no such file"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_18_and_44_what_changed_is_named(resumed: Refuse, write: Write, tmp_path: Path, case: str) -> None:
    options, code, *says = CHANGED[case]
    write(alpaca_lines(13), "other.jsonl")
    if "data_path" in options:
        options = {"data_path": tmp_path / options["data_path"]}
    resumed(code, *says, **options)


def test_44_another_base(resumed: Refuse, wider_base: Path) -> None:
    resumed(2, "the base model is not the checkpoint's: fingerprint", base_model=wider_base)


@pytest.mark.parametrize(
    ("name", "says"), [("state.json", "2 bytes, expected"), ("MANIFEST.json", "changed since it was written")]
)
def test_43_a_damaged_checkpoint_that_was_named(resumed: Refuse, tmp_path: Path, name: str, says: str) -> None:
    file = tmp_path / "out" / "checkpoint-2" / name
    file.write_text("{}")
    resumed(3, f"{file}: damaged or no checkpoint: {says}", "give another", resume_from_checkpoint=file.parent)
    resumed(2, f"{file}: resume_from_checkpoint: is not a folder, expected a check", resume_from_checkpoint=file)


def test_43_an_adapter_is_no_checkpoint(program: Program, adapter: Path) -> None:
    says = f"{adapter}/MANIFEST.json: damaged or no checkpoint: missing, expected a checkpoint folder"
    program.refuses("finetune", 3, says, "give another checkpoint, or auto", resume_from_checkpoint=adapter)


def test_43_all_damaged_is_an_error_and_one_is_not(program: Program, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    adapter = snapshot(out / WEIGHTS)
    (out / "checkpoint-2" / "state.json").write_text("{}")
    done = program("finetune", resume_from_checkpoint="auto")
    assert done.code == 0 and "checkpoint-2 is damaged" in done.err and "resuming from" in done.err
    assert snapshot(out / WEIGHTS) == adapter
    for path in out.glob("checkpoint-*/state.json"):
        path.write_text("{}")
    done = program("finetune", resume_from_checkpoint="auto")
    assert done.code == 3 and "every checkpoint is damaged" in done.result["error"]["message"]
    assert "--fresh" in done.result["error"]["message"] and snapshot(out / WEIGHTS) == adapter
