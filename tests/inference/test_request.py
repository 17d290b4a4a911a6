"""A request is validated, frozen and counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.inference.request import Completion, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("seed", -1), ("seed", 2**63), ("stop", ("",)), ("presence_penalty", 2.1), ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1), ("frequency_penalty", float("inf")), ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((-1, 1.0),)), ("logit_bias", ((1, float("nan")),)), ("logprobs", -1), ("logprobs", 21),
    ],
)  # fmt: skip
def test_impossible_values_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name and caught.value.expected


def test_params_are_frozen_and_greedy_by_default() -> None:
    params = SamplingParams()
    assert params.greedy and not SamplingParams(temperature=0.7).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_message_is_short_whatever_was_given() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(logit_bias=tuple((token, 1000.0) for token in range(100_000)))
    assert len(str(caught.value)) < 300


def test_completion_counts_its_tokens() -> None:
    assert Completion("hi", (1, 2, 3), "stop", 5).completion_tokens == 3
