"""GGUF files of tiny models, written with the stock writer the way llama.cpp's converter writes real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

SIZES = {"embedding_length": 32, "feed_forward_length": 48, "block_count": 2, "context_length": 256}
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "你", "\U0001f600", ""]

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
LLAMA_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
            module
        ] + f".{kind}"
    layer, inner = module.removeprefix("model.layers.").split(".", 1)
    norms = GEMMA_NORMS if architecture == "gemma3" else LLAMA_NORMS
    return f"blk.{layer}.{({**LAYER_NAMES, **norms})[inner]}.{kind}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama models."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def as_stored(name: str, tensor: torch.Tensor, architecture: str) -> np.ndarray:
    array = tensor.float().numpy()
    if architecture in ("llama", "mistral"):
        if ".q_proj." in name:
            return permute(array, 4)
        if ".k_proj." in name:
            return permute(array, 2)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return array + 1
    return array


def write_model(
    path: Path,
    state: Mapping[str, torch.Tensor],
    architecture: str = "llama",
    *,
    fields: Mapping[str, Any] | None = None,
    block_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """``state`` (Hugging Face names) as a file; matrices in ``block_type``; ``fields`` beside those of `SIZES` and
    `HEADS`."""
    writer = GGUFWriter(path, architecture)
    values = {**SIZES, **HEADS, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10_000.0, **(fields or {})}
    for key, value in values.items():
        if value is not None:
            add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_scores([float(-i) for i in range(len(TOKENS))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }} 你好")
    for name, tensor in state.items():
        array = as_stored(name, tensor, architecture)
        type_ = block_type if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name, architecture), quantize(array, type_), raw_dtype=type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
