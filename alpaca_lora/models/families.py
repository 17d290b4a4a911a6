"""The families of models: how each reads and writes its config.json, and nothing else that differs between them.

A new family of the same decoder is one `Family` here. Keys and defaults follow transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from alpaca_lora.errors import ModelFileError, nearest
from alpaca_lora.models.hf_config import MAX_LAYERS, HfReader, one_rope, read_rope, write_rope
from alpaca_lora.models.rope import RopeConfig

if TYPE_CHECKING:
    from alpaca_lora.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """``read``: the keys -> `ModelConfig` fields. ``write``: a `ModelConfig` -> the keys."""

    architecture: str
    read: Callable[[HfReader], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def find_family(hf: Mapping[str, Any], file: str | PathLike[str] | None) -> Family:
    """The family of a config.json; ModelFileError naming the supported ones."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        alike = nearest(str(model_type), FAMILIES)
        raise ModelFileError(
            "is missing" if model_type is None else f"unsupported architecture {model_type!r}",
            file=file,
            field="model_type",
            expected=f"one of {', '.join(FAMILIES)}",
            fix=f"did you mean {alike[0]!r}?" if model_type is not None and alike else None,
        )
    if hf.get("quantization_config"):
        raise ModelFileError(
            "quantized weights in this format are not supported",
            file=file,
            field="quantization_config",
            fix="use the unquantized folder or a .gguf file",
        )
    return FAMILIES[model_type]


# --- Llama-like ------------------------------------------------------------------------------------------------------


def read_sizes(reader: HfReader, *, head_dim: int | None = None, positions: int, tied: bool = False) -> dict[str, Any]:
    """What all Llama-like families share. ``head_dim``: the family's default; None: hidden_size / heads."""
    heads, width = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    if head_dim is None and reader.raw("head_dim") is None and width % heads:
        raise reader.error("num_attention_heads", f"is {heads}", f"a divisor of hidden_size = {width}")
    reader.refuse("rope_interleaved", False)
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_layers": reader.integer("num_hidden_layers", most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": reader.integer("head_dim", head_dim or width // heads),
        "max_position_embeddings": reader.integer("max_position_embeddings", positions),
        "norm_eps": reader.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", tied),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def write_llama_like(config: ModelConfig) -> dict[str, Any]:
    """Sizes, activation, a rotation; ``rope_theta`` and ``rope_scaling`` are for readers older than transformers 5."""
    rope = config.ropes[0]
    keys = {**write_sizes(config), "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh"}
    keys |= {"rope_parameters": write_rope(rope), "rope_theta": rope.theta}
    if rope.kind != "default":
        keys["rope_scaling"] = write_rope(rope)
    return keys


def read_llama(reader: HfReader) -> dict[str, Any]:
    sizes = read_sizes(reader, positions=2048)
    bias = reader.flag("attention_bias", False)
    return {
        **sizes,
        "ropes": one_rope(reader, sizes["max_position_embeddings"]),
        "activation": reader.activation("hidden_act", default="silu"),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": reader.flag("mlp_bias", False),
    }


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return {**write_llama_like(config), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def read_mistral(reader: HfReader) -> dict[str, Any]:
    sizes = read_sizes(reader, positions=131_072)
    # null says no window, a missing key says transformers' default
    window = reader.integer("sliding_window", 4096) if not _is_null(reader, "sliding_window") else None
    return {
        **sizes,
        "ropes": one_rope(reader, sizes["max_position_embeddings"]),
        "windows": (window,) * sizes["num_layers"],
        "activation": reader.activation("hidden_act", default="silu"),
    }


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**write_llama_like(config), "sliding_window": config.windows[0]}


def read_qwen(reader: HfReader, **sizes_of_family: Any) -> dict[str, Any]:
    """Qwen2 and Qwen3: windows only where ``use_sliding_window`` asks for them, from layer ``max_window_layers`` on."""
    sizes = read_sizes(reader, positions=32_768, **sizes_of_family)
    asked = reader.flag("use_sliding_window", False)
    window = reader.integer("sliding_window", 4096) if asked and not _is_null(reader, "sliding_window") else None
    first, layers = reader.integer("max_window_layers", 28, least=0), sizes["num_layers"]
    types = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    reader.raw("sliding_window")
    return {
        **sizes,
        "ropes": one_rope(reader, sizes["max_position_embeddings"]),
        "windows": layer_windows(reader, types, window),
        "activation": reader.activation("hidden_act", default="silu"),
    }


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    keys = {**write_llama_like(config), "layer_types": layer_types(config), "use_sliding_window": any(config.windows)}
    return {
        **keys,
        "sliding_window": max((w for w in config.windows if w), default=None),
        "max_window_layers": config.num_layers,
    }


def read_qwen2(reader: HfReader) -> dict[str, Any]:
    return {**read_qwen(reader), "qkv_bias": True}


def read_qwen3(reader: HfReader) -> dict[str, Any]:
    bias = reader.flag("attention_bias", False)
    return {**read_qwen(reader, head_dim=128), "qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**write_qwen(config), "attention_bias": config.qkv_bias}


def _is_null(reader: HfReader, key: str) -> bool:
    return reader.has(key) and reader.raw(key) is None


def layer_windows(reader: HfReader, default: list[str], window: int | None) -> tuple[int | None, ...]:
    """``layer_types`` of the file, else ``default``, as windows."""
    types = reader.words("layer_types", default, "full_attention", "sliding_attention")
    if window is None and "sliding_attention" in types:
        raise reader.error("sliding_window", "is null although layer_types has sliding_attention", "a number of tokens")
    return tuple(window if t == "sliding_attention" else None for t in types)


def layer_types(config: ModelConfig) -> list[str]:
    return ["full_attention" if window is None else "sliding_attention" for window in config.windows]


# --- Gemma 3 (text) --------------------------------------------------------------------------------------------------


def read_gemma3(reader: HfReader) -> dict[str, Any]:
    """Sandwich norms with weight + 1, QK-norm, scaled embeddings, local layers with their own rotation."""
    sizes = read_sizes(reader, head_dim=256, positions=131_072, tied=True)
    every = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(sizes["num_layers"])]
    windows = layer_windows(reader, types, reader.integer("sliding_window", 4096))
    reader.refuse("attn_logit_softcapping")
    reader.refuse("use_bidirectional_attention", False)
    bias = reader.flag("attention_bias", False)
    return {
        **sizes,
        "ropes": gemma3_ropes(reader, sizes["max_position_embeddings"]),
        "rope_of_layer": tuple(0 if window is None else 1 for window in windows),
        "windows": windows,
        "norm_offset": 1.0,
        "activation": reader.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
        "attention_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "sandwich_norms": True,
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "logit_softcap": reader.optional_number("final_logit_softcapping"),
    }


def gemma3_ropes(reader: HfReader, positions: int) -> tuple[RopeConfig, RopeConfig]:
    """(of full layers, of sliding layers); scaling, if any, is of the full layers."""
    theta, local = reader.number("rope_theta", 1_000_000.0), reader.number("rope_local_base_freq", 10_000.0)
    nested, scaling = reader.table("rope_parameters"), reader.table("rope_scaling")
    full, sliding = (nested.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        raise reader.error("rope_parameters", f"is {str(dict(nested))[:100]}", "an object per kind of layer")
    full = {**full, **scaling}
    return read_rope(reader, full, theta, positions), read_rope(reader, sliding, local, positions)


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    full, sliding = config.ropes
    scalar = round(config.attention_scale**-2, 6)
    return {
        **write_sizes(config),
        "hidden_activation": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "silu",
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attention_bias": config.qkv_bias,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": layer_types(config),
        "sliding_window": next((w for w in config.windows if w), 4096),
        "rope_parameters": {"full_attention": write_rope(full), "sliding_attention": write_rope(sliding)},
    }


# --- GPT-Neo ---------------------------------------------------------------------------------------------------------


def read_gpt_neo(reader: HfReader) -> dict[str, Any]:
    """Learned positions, LayerNorm, attention without scaling, alternating global and local layers."""
    width, heads = reader.integer("hidden_size"), reader.integer("num_heads")
    layers = reader.integer("num_layers", most=MAX_LAYERS)
    if width % heads:
        raise reader.error("num_heads", f"is {heads}", f"a divisor of hidden_size = {width}")
    window = reader.integer("window_size", 256)
    kinds = attention_kinds(reader, layers)
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.integer("intermediate_size", 4 * width),
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "max_position_embeddings": reader.integer("max_position_embeddings", 2048),
        "windows": tuple(window if kind == "local" else None for kind in kinds),
        "norm_eps": reader.number("layer_norm_epsilon", 1e-5),
        "activation": reader.activation("activation_function", default="gelu_new"),
        "attention_scale": 1.0,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
    }


def attention_kinds(reader: HfReader, layers: int) -> list[str]:
    """``attention_types`` [[[kind, ...], times], ...] as one kind per layer."""
    reader.raw("attention_layers")  # the same again, spelled out by transformers
    types = reader.raw("attention_types", [[["global", "local"], 12]])
    wanted = f"[[[kind, ...], times], ...] with kinds global and local, for {layers} layers"
    try:
        counts = [len(pattern) * times for pattern, times in types]
        kinds = [kind for pattern, times in types for kind in pattern * times] if sum(counts) == layers else []
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != layers or not all(kind in ("global", "local") for kind in kinds):
        raise reader.error("attention_types", f"is {str(types)[:100]}", wanted)
    return kinds


def write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_types": [[["global" if window is None else "local"], 1] for window in config.windows],
        "window_size": next((w for w in config.windows if w), 256),
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", read_llama, write_llama),
    "mistral": Family("MistralForCausalLM", read_mistral, write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", read_qwen2, write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", read_qwen3, write_qwen3),
    "gemma3_text": Family("Gemma3ForCausalLM", read_gemma3, write_gemma3),
    "gpt_neo": Family("GPTNeoForCausalLM", read_gpt_neo, write_gpt_neo),
}
