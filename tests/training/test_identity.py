from __future__ import annotations

import json
from pathlib import Path

import pytest

from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.errors import ConfigError, DataError, ModelFileError, UserError
from alpaca_lora.training.identity import FREE_KEYS, RunIdentity

FILE = Path("checkpoint-1/state.json")


def identity(
    *, steps: int = 10, data: str = "d", base: str = "b", hashes: dict[str, str] | None = None, **config
) -> RunIdentity:  # fmt: skip
    whole = FinetuneConfig.model_validate({"base_model": "m", "data_path": ["a.json"], **config})
    return RunIdentity.of(
        whole.model_dump(), total_steps=steps, warmup_steps=1, fingerprints={"base model": base, "data": data},
        data_hashes=hashes or {"a.json": "aaaa"},
    )  # fmt: skip


def saved(**arguments) -> dict:
    return json.loads(json.dumps(identity(**arguments).to_record()))


def test_the_same_run_passes_through_json() -> None:
    identity().check(saved(), file=FILE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1e-5), ("batch_size", 8), ("seed", 1), ("lora_target_modules", ["k_proj"]), ("lora_r", 2),
        ("cutoff_len", 64), ("weight_decay", 0.1), ("lr_scheduler_type", "cosine"), ("train_on_inputs", False),
    ],
)  # fmt: skip
def test_what_changes_the_training_is_refused_by_name_with_both_values(key: str, value: object) -> None:
    before = FinetuneConfig.model_fields[key].default
    with pytest.raises(ConfigError) as error:
        identity(**{key: value}).check(saved(), file=FILE)
    assert f"{key}: {before!r} in the checkpoint, {value!r} now" in str(error.value)


def test_all_differences_are_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"lora_r: .*; seed: "):
        identity(seed=1, lora_r=2).check(saved(), file=FILE)


def test_the_number_of_steps_is_compared_and_not_how_it_was_asked_for() -> None:
    identity(num_epochs=7, max_steps=10).check(saved(), file=FILE)
    with pytest.raises(ConfigError, match="total_steps: 10 in the checkpoint, 20 now"):
        identity(steps=20).check(saved(), file=FILE)


def test_free_keys_may_change() -> None:
    assert set(FinetuneConfig.model_fields) >= FREE_KEYS
    changed = identity(output_dir="x", eval_steps=1, save_total_limit=9, num_threads=1, report_to=["wandb"])
    changed.check(saved(), file=FILE)


@pytest.mark.parametrize("level", [True, "auto", "norms", "mlp"])
def test_what_is_recomputed_may_change(level: object) -> None:
    identity(gradient_checkpointing=level).check(saved(), file=FILE)
    identity().check(saved(gradient_checkpointing=level), file=FILE)


def test_averages_may_move_to_a_disk_and_back_but_not_into_8_bits() -> None:
    identity(optimizer_state="disk").check(saved(), file=FILE)
    identity().check(saved(optimizer_state="disk"), file=FILE)
    with pytest.raises(ConfigError, match="optimizer_state: absent in the checkpoint, 'int8' now"):
        identity(optimizer_state="int8").check(saved(), file=FILE)
    with pytest.raises(ConfigError, match="optimizer_state: 'int8' in the checkpoint, absent now"):
        identity(optimizer_state="disk").check(saved(optimizer_state="int8"), file=FILE)


def test_an_edited_data_file_is_named() -> None:
    with pytest.raises(DataError, match=r"b\.json: data_path: changed since the checkpoint: sha256 bbbb then, cccc"):
        identity(hashes={"a.json": "aaaa", "b.json": "cccc"}).check(
            saved(hashes={"a.json": "aaaa", "b.json": "bbbb"}), file=FILE
        )


def test_a_moved_data_file_is_the_same_file() -> None:
    identity(data_path=["/elsewhere/a.json"], hashes={"/elsewhere/a.json": "aaaa"}).check(saved(), file=FILE)


def test_another_base_or_other_encoded_rows() -> None:
    with pytest.raises(UserError, match="base model is not the checkpoint's: fingerprint b then, other now"):
        identity(base="other").check(saved(), file=FILE)
    with pytest.raises(DataError, match="the data is not the checkpoint's"):
        identity(data="other").check(saved(), file=FILE)


@pytest.mark.parametrize("record", [None, {}, [], {"config": {}}])
def test_a_checkpoint_that_does_not_say(record: object) -> None:
    with pytest.raises(ModelFileError, match="which run"):
        identity().check(record, file=FILE)
