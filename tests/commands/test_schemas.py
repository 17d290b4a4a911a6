"""The schemas compose rooms; the reference recipe and its flags are read as they are written."""

from __future__ import annotations

import inspect

import pytest

from alpaca_lora.cli import COMMANDS
from alpaca_lora.commands.schemas import SCHEMAS, FinetuneConfig, GenerateConfig, MergeConfig
from alpaca_lora.config import Options, resolve
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
                if (room.__name__, key) == ("MergeConfig", "dtype"):  # only described anew, see below
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
    assert sum(origin.startswith(str(path)) for origin in resolved.origins.values()) == 15


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


def test_merge_describes_its_dtype_and_changes_nothing_else_of_it() -> None:
    mine, models = MergeConfig.model_fields["dtype"], GenerateConfig.model_fields["dtype"]
    assert (mine.annotation, mine.default) == (models.annotation, models.default)
    assert "merged weights" in str(mine.description) and mine.description != models.description
