"""The schemas compose rooms; the reference recipe and its flags are read as they are written."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from alpaca_lora.adapters.base import METHODS
from alpaca_lora.adapters.options import READ_BY, AdapterOptions
from alpaca_lora.cli import COMMANDS
from alpaca_lora.commands.schemas import (
    METHOD_DEFAULTS,
    SCHEMAS,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    QuantizeConfig,
)
from alpaca_lora.config import Options, resolve
from alpaca_lora.errors import ConfigError
from tests.package_files import CHECKOUT

# the reference system's keys keep their names
REFERENCE_KEYS = """base_model data_path output_dir batch_size micro_batch_size num_epochs learning_rate cutoff_len
    val_set_size lora_r lora_alpha lora_dropout lora_target_modules train_on_inputs add_eos_token group_by_length
    wandb_project resume_from_checkpoint prompt_template_name""".split()


def test_every_command_has_a_schema() -> None:
    assert list(SCHEMAS) == list(COMMANDS)


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_no_key_stands_in_two_rooms(command: str) -> None:
    owners: dict[str, list[str]] = {}
    for room in SCHEMAS[command].__mro__:
        if issubclass(room, Options) and room is not Options:
            for key in inspect.get_annotations(room):
                if (
                    room.__name__ in ("MergeConfig", "QuantizeConfig") and key == "dtype"
                ):  # only described anew, see below
                    continue
                if key in SCHEMAS[command].model_fields:
                    owners.setdefault(key, []).append(room.__name__)
    assert {key: rooms for key, rooms in owners.items() if len(rooms) > 1} == {}


def test_the_reference_keys_are_kept() -> None:
    assert set(REFERENCE_KEYS) <= set(FinetuneConfig.model_fields)


def test_the_reference_recipe_is_read_as_it_stands() -> None:
    path = CHECKOUT / "configs" / "finetune.yml"
    resolved = resolve(FinetuneConfig, ["--config", str(path)], "finetune")
    value = resolved.value
    assert value.base_model == "smollm2-135m"
    assert value.data_path == ["../shared/data/alpaca_data.json"]
    assert (value.batch_size, value.micro_batch_size, value.num_epochs) == (128, 4, 3)
    assert (value.learning_rate, value.cutoff_len, value.val_set_size) == (3e-4, 512, 2000)
    assert (value.lora_r, value.lora_alpha, value.lora_dropout) == (8, 16, 0.05)
    assert value.lora_target_modules == ["q_proj", "v_proj"]
    assert value.train_on_inputs and value.group_by_length
    assert sum(origin.startswith(str(path)) for origin in resolved.origins.values()) == 14


def test_the_reference_flags_are_read_as_they_are_written() -> None:
    line = """--config configs/finetune.yml --base_model smollm2-135m --data_path ../shared/data/alpaca_data.json
        --max_steps 20 --num_epochs 10 --lora_r 16 --lora_target_modules q_proj,k_proj,v_proj,o_proj"""
    value = resolve(FinetuneConfig, line.replace("configs/", f"{CHECKOUT}/configs/").split(), "finetune").value
    assert (value.max_steps, value.num_epochs, value.lora_r) == (20, 10, 16)
    assert value.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    published = "[q_proj,k_proj,v_proj,o_proj]"
    flags = ["--base_model", "m", "--data_path", "d", "--lora_target_modules", published]
    assert resolve(FinetuneConfig, flags, "finetune").value.lora_target_modules == value.lora_target_modules


def test_the_models_keys_are_the_same_in_every_command() -> None:
    for key in ("base_model", "device", "dtype", "num_threads"):
        assert FinetuneConfig.model_fields[key].default == GenerateConfig.model_fields[key].default


@pytest.mark.parametrize(("schema", "words"), [(MergeConfig, "merged weights"), (QuantizeConfig, "stays dense")])
def test_a_dtype_that_is_described_anew_is_the_same_otherwise(schema: type[Options], words: str) -> None:
    mine, models = schema.model_fields["dtype"], GenerateConfig.model_fields["dtype"]
    assert (mine.annotation, mine.default) == (models.annotation, models.default)
    assert words in str(mine.description) and mine.description != models.description


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("--method prefix --lora_r 4", "--lora_r"), ("--num_virtual_tokens 4", "--num_virtual_tokens"),
        ("--method freeze --trained_modules norm --train_last_layers 1", "--train_last_layers"),
        ("--class_weights balanced", "--class_weights"), ("--prefix_hidden_size 8", "--prefix_hidden_size"),
        ("--task classification --prompt_template_name alpaca", "--prompt_template_name"),
        ("--val_set_size 0 --early_stopping_patience 2", "--early_stopping_patience"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_refused(words: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: has no effect: "):
        resolve(FinetuneConfig, ["--base_model", "b", "--data_path", "d", *words.split()], "finetune")


def test_a_key_of_a_file_without_effect_is_said(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("base_model: b\ndata_path: d\nlora_r: 4\nlora_alpha: 8\n")
    assert resolve(FinetuneConfig, ["--config", str(path)], "finetune").notices == ()
    resolved = resolve(FinetuneConfig, ["--config", str(path), "--method", "prefix"], "finetune")
    assert resolved.notices == (f"{path}: without effect, because method prefix does not read it: lora_r, lora_alpha",)


def test_every_key_of_the_adapter_is_read_by_some_method_and_only_such() -> None:
    assert set(READ_BY) == set(AdapterOptions.model_fields) - {"method"}
    assert {method for readers in READ_BY.values() for method in readers} | {"full"} == set(METHODS)


def test_a_method_has_its_own_defaults_and_the_user_wins() -> None:
    words = ["--base_model", "b", "--data_path", "d", "--method", "prefix"]
    resolved = resolve(FinetuneConfig, words, "finetune")
    assert resolved.value.learning_rate == METHOD_DEFAULTS["prefix"]["learning_rate"] != 3e-4
    assert resolved.origins["learning_rate"] == "default of this method or task"
    assert resolve(FinetuneConfig, [*words, "--learning_rate", "0.5"], "finetune").value.learning_rate == 0.5
