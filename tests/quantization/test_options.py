"""Options of quantization: each setting is read by the schemes that have it; what belongs together is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any, cast, get_args

import pytest

from alpaca_lora.commands.schemas import FinetuneConfig, GenerateConfig, QuantizeConfig
from alpaca_lora.errors import ConfigError
from alpaca_lora.quantization.options import READ_BY, ROUNDINGS, OnLoad, SchemeName
from alpaca_lora.quantization.plan import scheme_settings
from alpaca_lora.quantization.scheme import SCHEMES, scheme_class

NAME_IN_SCHEME = {"fp8_format": "format"}  # a scheme knows its own kind, the command line does not
TRAINING = {"base_model": "m", "data_path": ["d"]}


def test_the_names_are_those_of_the_schemes() -> None:
    assert [*get_args(SchemeName)] == [*SCHEMES, "mixed"]
    assert [*get_args(OnLoad)] == [name for name in SCHEMES if not scheme_class(name).needs_calibration]


def test_every_setting_is_read_by_the_schemes_that_have_it() -> None:
    for name in SCHEMES:
        has = {field.name for field in dataclasses.fields(scheme_class(name))} - {"input_scales"}  # AWQ decides them
        assert has == {NAME_IN_SCHEME.get(key, key) for key, readers in READ_BY.items() if name in readers}


@pytest.mark.parametrize("key", READ_BY)
def test_every_setting_arrives(key: str) -> None:
    scheme = min(READ_BY[key])
    value = {"block_size": 128, "double_quant": False, "group_size": 32, "symmetric": True, "fp8_format": "e5m2",
             "observer": "minmax", "percentile": 99.0}[key]  # fmt: skip
    asked: dict[str, Any] = {"base_model": "m", "output_dir": "o", "calibration_data": "c", "scheme": scheme}
    assert scheme_settings(QuantizeConfig(**asked)) == {}
    settings = scheme_settings(QuantizeConfig(**{**asked, key: value}))
    assert settings == {NAME_IN_SCHEME.get(key, key): value}
    assert getattr(scheme_class(scheme).make(settings), NAME_IN_SCHEME.get(key, key)) == value


def test_one_form_of_the_base_at_a_time() -> None:
    both: dict[str, Any] = {"quantize": "nf4", "quantization_plan": "p.yml"}
    with pytest.raises(ConfigError, match=r"^quantize: stands beside quantization_plan, leave one of both out"):
        GenerateConfig(base_model="m", **both)
    for key, value in both.items():
        beside: dict[str, Any] = {**TRAINING, "quantization_aware": "int4", key: value}
        with pytest.raises(ConfigError, match=f"^quantization_aware: stands beside {key}, expected a dense base"):
            FinetuneConfig(**beside)


def test_what_needs_rows() -> None:
    asked: dict[str, Any] = {"base_model": "m", "output_dir": "o"}
    kinds: list[dict[str, Any]] = [
        {"scheme": "int8_static"}, {"scheme": "int4", "rounding": "awq"}, {"scheme": "mixed", "bits": 5}
    ]  # fmt: skip
    for more in kinds:
        assert QuantizeConfig(**asked, **more, calibration_data="c").needs_calibration
        with pytest.raises(ConfigError, match=r"^calibration_data: missing: this is made by running the model on rows"):
            QuantizeConfig(**asked, **more)
    assert not QuantizeConfig(**asked, scheme="int4").needs_calibration


def test_how_codes_are_chosen_is_what_the_scheme_can() -> None:
    """The table that --help needs without torch says what the schemes say; another choice is told to have no effect."""
    choices = get_args(QuantizeConfig.model_fields["rounding"].annotation)
    for name in SCHEMES:
        roundings = scheme_class(name).roundings
        assert set(ROUNDINGS.get(name, ("nearest",))) == roundings <= set(choices)
        for rounding in choices:
            config = QuantizeConfig(
                base_model="m", output_dir="o", scheme=cast(Any, name), rounding=rounding, calibration_data="c"
            )
            assert ("rounding" in config.unused()) is (len(roundings) == 1 or rounding not in roundings)
