"""Frequencies of every kind against transformers' own functions; positions of packed streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.rope import Rope, RopeConfig, dynamic_frequencies

PUBLISHED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn ": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn  ": {"factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False, "attention_factor": 1.3},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_frequencies_equal_transformers_at_published_sizes(kind: str) -> None:
    parameters = {"rope_type": kind.strip(), "rope_theta": 500_000.0, **PUBLISHED[kind]}
    theirs = transformers.LlamaConfig(rope_parameters=parameters, max_position_embeddings=131_072)
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind.strip()](theirs, "cpu")
    rope = Rope(ModelConfig.from_hf(theirs.to_dict()).ropes[0], 128)
    torch.testing.assert_close(rope.inv_freq_E, inv_freq, rtol=1e-5, atol=0)
    assert rope.magnitude == pytest.approx(scale, rel=1e-12)


def test_dynamic_stretches_each_run_by_its_own_length() -> None:
    config = RopeConfig(10_000.0, "dynamic", 2.0, 16)
    theirs = transformers.LlamaConfig(
        head_dim=8,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )
    lengths = (3, 40, 16, 1, 17)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    frequencies = dynamic_frequencies(config, 8, positions_T).split(lengths)
    for length, rows in zip(lengths, frequencies, strict=True):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=length)
        torch.testing.assert_close(rows, expected.expand_as(rows), rtol=1e-5, atol=0)
    assert not torch.equal(frequencies[0][0], frequencies[1][0])


def test_dynamic_while_decoding_reads_the_length_off_the_position() -> None:
    """One new token per sequence: two sequences at 30 and 31 are a run by chance and must not share a length."""
    config = RopeConfig(10_000.0, "dynamic", 2.0, 16)
    alone = dynamic_frequencies(config, 8, torch.tensor([30]))
    beside_a_longer_one = dynamic_frequencies(config, 8, torch.tensor([30, 31]))
    assert torch.equal(alone[0], beside_a_longer_one[0])
    assert not torch.equal(alone[0], beside_a_longer_one[1])


def test_angles_are_float32_and_far_positions_stay_exact_in_bfloat16() -> None:
    rope = Rope(RopeConfig(10_000.0), 8)
    cos_TE, sin_TE = rope(torch.tensor([0, 5000]), torch.bfloat16)
    assert cos_TE.dtype == sin_TE.dtype == torch.bfloat16
    exact = torch.tensor(5000.0, dtype=torch.float64).cos()
    assert abs(cos_TE[1, 0].double() - exact) < 2**-8
    assert torch.equal(cos_TE[:, :4], cos_TE[:, 4:])
    assert cos_TE[0].eq(1).all() and sin_TE[0].eq(0).all()
