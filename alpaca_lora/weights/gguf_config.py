"""GGUF metadata as the keys of a Hugging Face ``config.json``. Knows keys and sizes; reads no weights but the rotary
factors.

Source: the GGUF specification, section "LLM", and transformers' configuration classes for what the keys mean there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_lora.errors import ModelFileError
from alpaca_lora.weights.gguf_header import GgufHeader

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
GEMMA3_PATTERN = 6  # every sixth layer of Gemma 3 sees everything, the others a window
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_LAYERS_27B = 62  # the one size whose query scale is not its head width


@dataclass(frozen=True)
class Metadata:
    """The keys of one architecture, with errors that name file and key."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]

    def error(self, key: str, what: str, expected: str | None = None) -> ModelFileError:
        return ModelFileError(what, file=self.path, field=f"{self.architecture}.{key}", expected=expected)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some writers repeat one number per layer
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.error(key, "is missing" if value is None else f"is {str(value)[:60]}", "a whole number above 0")
        return value

    def optional(self, key: str) -> int | None:
        value = self.fields.get(f"{self.architecture}.{key}")
        return None if not value else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, "is missing" if value is None else f"is {str(value)[:60]}", "a number")
        # 1e-5 is stored as the nearest float32; the shortest decimal that means it is what config.json had
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.fields


def find_architecture(path: Path, header: GgufHeader) -> str:
    """``general.architecture``; ModelFileError naming the supported ones when it is none of them."""
    name = header.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelFileError(
            f"unsupported architecture {str(name)[:60]!r}" if name else "is missing", file=path,
            field="general.architecture", expected=f"one of {', '.join(ARCHITECTURES)}",
        )  # fmt: skip
    return name


def config_from_gguf(path: Path, header: GgufHeader, read_floats: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The config.json that this file would have. ``read_floats(name)`` gives a small tensor (the rotary factors)."""
    architecture = find_architecture(path, header)
    keys = Metadata(path, architecture, header.fields)
    if keys.optional("expert_count") is not None:
        raise keys.error("expert_count", "mixtures of experts are not supported")
    config = _sizes(keys, header)
    config["model_type"] = ARCHITECTURES[architecture]
    config["rope_theta"] = keys.number("rope.freq_base", 10_000.0)
    if (scaling := _rope_scaling(keys, header, config, read_floats)) is not None:
        config["rope_scaling"] = scaling
    config |= _special_ids(header.fields)
    if architecture == "gemma3":
        config |= _gemma3(keys, config)
    elif (window := keys.optional("attention.sliding_window")) is not None:
        config |= _windowed(keys, config["model_type"], window, config["num_hidden_layers"])
    elif config["model_type"] == "mistral":
        config["sliding_window"] = None
    if config["model_type"] == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.blocks
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.blocks
    if config["model_type"] == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.blocks
    return config


def _sizes(keys: Metadata, header: GgufHeader) -> dict[str, Any]:
    if (embedding := header.blocks.get("token_embd.weight")) is None or len(embedding.shape) != 2:
        raise ModelFileError("is missing", file=keys.path, field="token_embd.weight", expected="a matrix")
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if not keys.has("attention.key_length") and width % heads:
        raise keys.error("attention.head_count", f"is {heads}", f"a divisor of {width}")
    head_dim = keys.integer("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"is {keys.integer(key)}", f"{head_dim}, the width of a head")
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length", 2048),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.blocks,
        "hidden_act": "silu",
    }
    return config


def _windowed(keys: Metadata, model_type: str, window: int, layers: int) -> dict[str, Any]:
    """A window on all layers: Llama with one is Mistral; Qwen says it in three keys."""
    if keys.has("attention.sliding_window_pattern"):
        raise keys.error("attention.sliding_window_pattern", "a window on some of the layers is not supported")
    if model_type in ("llama", "mistral"):
        return {"model_type": "mistral", "sliding_window": window}
    return {
        "sliding_window": window, "use_sliding_window": True, "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * layers,
    }  # fmt: skip


def _gemma3(keys: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, pattern = config["num_hidden_layers"], GEMMA3_PATTERN
    scale = config["hidden_size"] // config["num_attention_heads"]
    extra = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["full_attention" if i % pattern == pattern - 1 else "sliding_attention" for i in range(layers)],
        "rope_local_base_freq": keys.number("rope.freq_base_swa", GEMMA3_LOCAL_THETA),
        "query_pre_attn_scalar": scale if layers == GEMMA3_LAYERS_27B else config["head_dim"],
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }
    if keys.has("final_logit_softcapping"):
        extra["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    return extra


def _special_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    found = {
        f"{hf}_token_id": fields.get(f"tokenizer.ggml.{gguf}_token_id")
        for gguf, hf in names.items()
        if fields.get(f"tokenizer.ggml.{gguf}_token_id") is not None
    }
    return found


def _rope_scaling(
    keys: Metadata, header: GgufHeader, config: Mapping[str, Any], read_floats: Callable[[str], np.ndarray]
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in header.blocks:
        return _llama3_scaling(keys, config, read_floats("rope_freqs.weight"))
    kind = keys.fields.get(f"{keys.architecture}.rope.scaling.type", "none")
    if kind == "none":
        if keys.has("rope.scale_linear") and (factor := keys.number("rope.scale_linear")) != 1.0:
            return {"rope_type": "linear", "factor": factor}
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind != "yarn":
        raise keys.error("rope.scaling.type", f"unsupported {str(kind)[:60]!r}", "none, linear or yarn")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    for name in ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        # we do not know whether it replaces or multiplies
        if keys.has(name) and (factor := keys.number(name)) != 1.0:
            raise keys.error(name, f"{factor:g} is not supported", "1, or no such key")
    optional = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    for gguf, hf in optional.items():
        if keys.has(f"rope.scaling.{gguf}"):
            scaling[hf] = keys.number(f"rope.scaling.{gguf}")
    return scaling


def _llama3_scaling(keys: Metadata, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any] | None:
    """Llama 3.1's rotary scaling out of the divisors of each frequency that the file holds instead of the four numbers.

    The file loses which numbers they came from; the published models all use 1, 4 and 8192 with a factor of their own.
    They are only taken when they give the file's divisors back.
    """
    factor = float(factors.max())
    if factor == 1.0 and float(factors.min()) == 1.0:
        return None
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    expected = llama3_divisors(config["rope_theta"], config["head_dim"], scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        what = "rotary factors that are not those of Llama 3.1"
        raise ModelFileError(
            what, file=keys.path, field="rope_freqs.weight", fix="use the Hugging Face folder of this model"
        )
    return scaling


def llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, (E/2,): 1 where it turns fast, ``factor`` where slowly, between
    them smoothly."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
