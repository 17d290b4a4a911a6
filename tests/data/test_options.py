"""The data room's keys."""

from __future__ import annotations

import pytest

from alpaca_lora.data.options import DataOptions
from alpaca_lora.errors import ConfigError


def test_one_path_may_stand_without_a_list() -> None:
    assert DataOptions(data_path="rows.json").data_path == ["rows.json"]  # type: ignore[arg-type]


def test_the_reference_recipe_stands_in_the_defaults() -> None:
    options = DataOptions(data_path=["rows.json"])
    assert (options.batch_size, options.micro_batch_size, options.cutoff_len) == (128, 4, 512)
    assert (options.val_set_size, options.train_on_inputs, options.group_by_length) == (2000, True, False)


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"skip_cleaning": ["whitespaces"]}, "skip_cleaning", "did you mean whitespace"),
        ({"val_set_size": 12.5}, "val_set_size", "neither a count nor a share"),
        ({"input_key": "context"}, "input_key", "is given alone"),
    ],
)
def test_values_that_make_no_sense_name_their_key(values: dict, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        DataOptions(data_path=["rows.json"], **values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"cutoff_len": 1}, {"val_set_size": -1}, {"data_path": []}, {"over_length": "cut"}]
)
def test_limits(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DataOptions(**{"data_path": ["rows.json"], **values})


def test_shares_and_counts_are_both_fine() -> None:
    assert DataOptions(data_path=["x"], val_set_size=0.05).val_set_size == 0.05
    assert DataOptions(data_path=["x"], val_set_size=2000.0).val_set_size == 2000


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"label_key": "label"}, "label_key", "is not a key of task generation, set task to classification"),
        ({"task": "classification", "prompt_key": "q"}, "prompt_key", "is not a key of task classification, give text"),
        ({"task": "classification", "text_key": "a", "label_key": "a"}, "label_key", "is 'a', as text_key is"),
    ],
)
def test_a_key_belongs_to_a_task(values: dict, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        DataOptions(data_path=["rows.tsv"], **values)
    assert caught.value.field == field
    assert DataOptions(data_path=["rows.tsv"], task="classification", text_key="a", label_key="b").label_key == "b"
