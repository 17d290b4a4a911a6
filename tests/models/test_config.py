"""config.json: read, written back, and refused with the key's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from alpaca_lora.errors import ModelFileError
from alpaca_lora.models.config import ModelConfig
from tests.models.hf_models import GEMMA3, GPT_NEO, LLAMA, MODELS, QWEN3
from tests.tiny import tiny_config


@pytest.mark.parametrize("name", MODELS)
def test_to_hf_gives_the_same_model_back_to_us_and_to_transformers(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_hf(MODELS[name])
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    assert theirs.architectures == written["architectures"]
    assert hasattr(transformers, written["architectures"][0])


@pytest.mark.parametrize("name", MODELS)
def test_a_config_without_defaults_means_what_transformers_means(name: str) -> None:
    """`MODELS` leaves most keys out; transformers writes all of them."""
    keys = dict(MODELS[name])
    theirs = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    assert ModelConfig.from_hf(MODELS[name]) == ModelConfig.from_hf(theirs.to_dict())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neo"])
def test_defaults_of_a_family(model_type: str) -> None:
    base = GPT_NEO if model_type == "gpt_neo" else {**LLAMA, "hidden_size": 64}
    keys = {
        k: v for k, v in base.items() if k not in ("max_position_embeddings", "rms_norm_eps", "num_key_value_heads")
    }
    if model_type in ("gemma3_text", "mistral", "qwen2", "qwen3"):  # their default of key heads is not the query's
        keys["num_key_value_heads"] = 2
    keys["model_type"] = model_type
    theirs = transformers.AutoConfig.for_model(**{k: v for k, v in keys.items()})
    assert ModelConfig.from_hf(keys) == ModelConfig.from_hf(theirs.to_dict())


def test_the_older_spelling_of_rope_means_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}}
    new = {**LLAMA, "rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    old = {
        **GEMMA3,
        "rope_theta": 5e5,
        "rope_local_base_freq": 3e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    }
    full = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}
    sliding = {"rope_type": "default", "rope_theta": 3e3}
    new = {**GEMMA3, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_keys_without_a_use_are_kept_for_writing() -> None:
    config = ModelConfig.from_hf({**LLAMA, "eos_token_id": [2, 7], "initializer_range": 0.5, "torch_dtype": "float16"})
    written = config.to_hf()
    assert (written["eos_token_id"], written["initializer_range"]) == ([2, 7], 0.5)
    assert "torch_dtype" not in written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen3_moe"},
            "model_type: unsupported architecture 'qwen3_moe', expected one of llama, .*'qwen3'",
        ),
        ({"model_type": None}, "model_type: is missing, expected one of llama"),
        ({"hidden_size": None}, "hidden_size: is missing, expected a whole number"),
        ({"hidden_size": 0}, "hidden_size: is 0, expected 1 to 16777216"),
        ({"hidden_size": float("nan")}, "hidden_size: is nan, expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: is 1000000000, expected 1 to 1000"),
        ({"head_dim": 2**23}, "head_dim: 4 heads of 8388608 are too wide"),
        ({"rope_interleaved": True}, "rope_interleaved: True is not supported"),
        ({"hidden_size": "32"}, "hidden_size: is '32', expected a whole number"),
        ({"vocab_size": True}, "vocab_size: is True, expected a whole number"),
        ({"num_attention_heads": 5}, "num_attention_heads: is 5, expected a divisor of hidden_size = 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: is 3, expected a divisor of num_attention_heads = 4"),
        ({"head_dim": 7}, "head_dim: is 7, expected an even number"),
        ({"hidden_act": "relu"}, "hidden_act: unknown activation 'relu', expected one of silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: is 'yes', expected true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: is nan, expected a number"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope_scaling.rope_type: unsupported 'longrope', expected one of default",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing, expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor: is -1, expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling: is 'linear', expected an object"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, ".*: a rotation of a part of each head is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized weights .* not supported"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    keys = {**LLAMA, **change}
    with pytest.raises(ModelFileError, match=f"^m/config.json: {message}"):
        ModelConfig.from_hf({k: v for k, v in keys.items() if v is not None}, file="m/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ({"layer_types": ["full_attention"]}, "windows: has 1 entries, expected one per layer, 4"),
        (
            {"layer_types": ["linear_attention"] * 4},
            "layer_types: is .*linear_attention.*, expected a list of full_attention or",
        ),
    ],
)
def test_what_gemma_could_ask_for_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=f"^m/config.json: {message}"):
        ModelConfig.from_hf({**GEMMA3, **change}, file="m/config.json")


def test_gpt_neo_patterns_must_give_every_layer_a_kind() -> None:
    with pytest.raises(ModelFileError, match=r"attention_types: is .*'local'.*, expected .* for 3 layers"):
        ModelConfig.from_hf({**GPT_NEO, "attention_types": [[["global", "local"], 1]]})


JUNK = (None, True, -1, 0, 0.5, 10**30, float("nan"), "x", [], ["x"], [[["x"], 10**12]], {}, {"x": 1}, {"factor": "x"})


@pytest.mark.parametrize("keys", [LLAMA, QWEN3, GEMMA3, GPT_NEO], ids=lambda keys: keys["model_type"])
def test_junk_under_any_key_is_refused_or_read_and_nothing_else(keys: dict[str, Any]) -> None:
    full = ModelConfig.from_hf({**keys, "sliding_window": 4}).to_hf() | dict.fromkeys(
        ("rope_scaling", "sliding_window_pattern", "max_window_layers", "use_sliding_window", "quantization_config")
    )
    refused = 0
    for key in full:
        for junk in JUNK:
            try:
                config = ModelConfig.from_hf({**full, key: junk})
            except ModelFileError:
                refused += 1
            else:
                assert ModelConfig.from_hf(config.to_hf()) == config
    assert refused > 100


def test_tiny_config_takes_any_field() -> None:
    assert tiny_config(num_layers=3).windows == (None, None, None)
    assert ModelConfig.from_hf(tiny_config().to_hf()) == tiny_config()
