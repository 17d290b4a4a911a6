"""GGUF metadata as config.json, with transformers' configuration classes as the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.gguf import open_gguf
from alpaca_lora.weights.gguf_config import llama3_divisors
from tests.weights.tiny_gguf import write_model

EMBEDDING = {"model.embed_tokens.weight": torch.ones(10, 32)}


def config_of(path: Path, architecture: str = "llama", state: Any = None, **arguments: Any) -> dict[str, Any]:
    source = open_gguf(write_model(path / "m.gguf", state or EMBEDDING, architecture, **arguments))
    source.close()
    return source.config


def test_sizes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    expected = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    assert "rope_scaling" not in config


def test_head_is_tied_only_when_the_file_has_none(tmp_path: Path) -> None:
    state = {**EMBEDDING, "lm_head.weight": torch.ones(10, 32)}
    assert config_of(tmp_path, state=state)["tie_word_embeddings"] is False


def test_real_model(smollm2: Path) -> None:
    source = open_gguf(smollm2)
    source.close()
    config = source.config
    theirs = AutoConfig.for_model(**config)
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]) == (9, 3, 49_152)
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 100_000.0, True)
    assert theirs.rope_parameters["rope_theta"] == 100_000.0 and theirs.max_position_embeddings == 8192


def test_a_llama_with_a_window_is_mistral(tmp_path: Path) -> None:
    config = config_of(tmp_path, fields={"attention.sliding_window": 64})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)
    assert config_of(tmp_path, "mistral")["sliding_window"] is None


def test_qwen_with_a_window(tmp_path: Path) -> None:
    config = config_of(tmp_path, "qwen2", fields={"attention.sliding_window": 64})
    assert AutoConfig.for_model(**config).layer_types == ["sliding_attention"] * 2
    assert AutoConfig.for_model(**config_of(tmp_path, "qwen2")).layer_types == ["full_attention"] * 2


def test_qwen3_brings_its_head_width(tmp_path: Path) -> None:
    fields = {"attention.key_length": 16, "attention.value_length": 16}
    config = config_of(tmp_path, "qwen3", fields=fields)
    assert (config["model_type"], config["head_dim"], config["attention_bias"]) == ("qwen3", 16, False)


def test_gemma3(tmp_path: Path) -> None:
    fields = {
        "attention.sliding_window": 64, "block_count": 8, "rope.freq_base": 1e6, "attention.key_length": 16,
        "attention.value_length": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    }  # fmt: skip
    config = config_of(tmp_path, "gemma3", fields=fields)
    theirs = AutoConfig.for_model(**config)
    assert theirs.model_type == "gemma3_text"
    assert [i for i, kind in enumerate(theirs.layer_types) if kind == "full_attention"] == [5]
    assert theirs.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert theirs.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert (theirs.query_pre_attn_scalar, theirs.sliding_window, theirs.head_dim) == (16, 64, 16)
    assert theirs.hidden_activation == "gelu_pytorch_tanh" and theirs.final_logit_softcapping is None


def test_gemma3_27b_scales_queries_by_width_over_heads(tmp_path: Path) -> None:
    fields = {
        "attention.sliding_window": 64,
        "block_count": 62,
        "attention.key_length": 16,
        "attention.value_length": 16,
    }
    assert config_of(tmp_path, "gemma3", fields=fields)["query_pre_attn_scalar"] == 8


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, fields: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert config_of(tmp_path, fields=fields).get("rope_scaling") == scaling


@pytest.mark.parametrize("key", ["yarn_attn_factor", "attn_factor"])
def test_an_attention_factor_of_yarn_is_refused(tmp_path: Path, key: str) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    fields = {f"rope.scaling.{name}": value for name, value in yarn.items()}
    scaling = config_of(tmp_path, fields={**fields, f"rope.scaling.{key}": 1.0})["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ModelFileError, match=rf"llama\.rope\.scaling\.{key}.*1\.2 is not supported"):
        config_of(tmp_path, fields={**fields, f"rope.scaling.{key}": 1.2})


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_llama3_divisors_are_those_of_transformers() -> None:
    for theta, head_dim in ((500_000.0, 64), (500_000.0, 128), (10_000.0, 8)):
        config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters={**LLAMA3, "rope_theta": theta})
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        np.testing.assert_allclose(plain / llama3_divisors(theta, head_dim, LLAMA3), theirs.numpy(), rtol=1e-5)


def test_llama3_scaling_is_found_from_its_divisors(tmp_path: Path) -> None:
    fields = {"rope.freq_base": 500_000.0, "attention.key_length": 64, "attention.value_length": 64}
    factors = llama3_divisors(500_000.0, 64, LLAMA3)
    config = config_of(tmp_path, fields=fields, extra={"rope_freqs.weight": factors})
    assert config["rope_scaling"] == LLAMA3
    factors[20] *= 1.1
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight: rotary factors that are not those"):
        config_of(tmp_path, fields=fields, extra={"rope_freqs.weight": factors})
    plain = config_of(tmp_path, extra={"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    assert "rope_scaling" not in plain


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("bert", {}, r"general\.architecture: unsupported architecture 'bert', expected one of llama, .*gemma3"),
        ("llama", {"expert_count": 8}, r"llama\.expert_count: mixtures of experts"),
        ("llama", {"embedding_length": None}, r"llama\.embedding_length: is missing"),
        ("llama", {"block_count": "2"}, r"llama\.block_count: is 2, expected a whole number"),
        ("llama", {"attention.head_count": 5}, r"llama\.attention\.head_count: is 5, expected a divisor of 32"),
        ("llama", {"attention.head_count_kv": [1, 2]}, r"llama\.attention\.head_count_kv: is \[1, 2\]"),
        ("llama", {"rope.dimension_count": 4}, r"llama\.rope\.dimension_count: is 4, expected 8"),
        ("llama", {"attention.value_length": 4}, r"llama\.attention\.value_length: is 4"),
        ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon: is nan"),
        ("llama", {"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type: unsupported 'longrope'"),
        ("gemma3", {}, r"gemma3\.attention\.sliding_window: is missing"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        config_of(tmp_path, architecture, fields=fields)


def test_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"token_embd\.weight: is missing"):
        config_of(tmp_path, state={"model.norm.weight": torch.ones(32)})


def test_one_number_per_layer_that_is_the_same_for_all(tmp_path: Path) -> None:
    config = config_of(tmp_path, fields={"attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48]})
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 48)
