"""Seeded tiny models of every family in transformers, the oracle of this room's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from alpaca_lora.models.build import build_model
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
GPT_NEO = {
    "model_type": "gpt_neo",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local", "local"], 1]],
    "window_size": 5,
}


def rope(kind: str, **parameters: float | bool) -> dict[str, Any]:
    return {**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


# name -> config.json; sequences of the tests are up to 40 tokens, so windows of 5 and trained contexts of 16 act
MODELS: Mapping[str, dict[str, Any]] = {
    "llama1-multi-head": {**LLAMA, "num_key_value_heads": 4},
    "llama2-grouped-query": {**LLAMA, "rope_theta": 5000.0},
    "llama-multi-query-tied": {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-bias-wide-heads": {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama-gelu": {**LLAMA, "hidden_act": "gelu_pytorch_tanh"},
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "rope-linear": rope("linear", factor=3.0),
    "rope-dynamic": {**rope("dynamic", factor=2.0), "max_position_embeddings": 16},
    "rope-yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "rope-yarn-mscale": rope(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        mscale=0.7,
        mscale_all_dim=0.9,
        beta_fast=16.0,
        beta_slow=2.0,
    ),
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "mistral-no-window": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3-bias-window": {
        **QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "gemma3": GEMMA3,
    "gemma3-softcap-scaled": {
        **GEMMA3,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt-neo": GPT_NEO,
    "gpt-neo-inner": {**GPT_NEO, "intermediate_size": 40},
}


def hf_model(name: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """The float32 model of transformers, every weight (biases and norms too) drawn from ``seed``."""
    keys = {**MODELS[name], **overrides}
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def ours_from(theirs: transformers.PreTrainedModel) -> CausalLM:
    """Our model with their weights, by their own config and parameter names."""
    model = build_model(ModelConfig.from_hf(theirs.config.to_dict()), device="cpu")
    tensors = dict(theirs.named_parameters())  # a tied head appears once
    ours = dict(model.named_parameters())
    assert set(ours) == set(tensors)
    for name, parameter in ours.items():
        assert parameter.shape == tensors[name].shape, name
        parameter.data.copy_(tensors[name].data)
    return model
