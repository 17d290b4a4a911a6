"""Tensor names: Hugging Face's are ours; a table for GGUF's.

Source: the tensor names of the GGUF specification, section "Standardized tensor names".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

GGUF_GLOBAL: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

GGUF_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Gemma normalises before and after each half of a layer, so two of the names mean something else
GGUF_LAYER_GEMMA: Mapping[str, str] = {
    **GGUF_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")
_GLOBAL = re.compile(r"([a-z_]+)\.(weight|bias)")


def gguf_to_hf(name: str, *, gemma: bool = False) -> str | None:
    """``blk.0.attn_q.weight`` -> ``model.layers.0.self_attn.q_proj.weight``; None when the table has no such tensor."""
    if match := _LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        inner = (GGUF_LAYER_GEMMA if gemma else GGUF_LAYER).get(part)
        return None if inner is None else f"model.layers.{layer}.{inner}.{kind}"
    if match := _GLOBAL.fullmatch(name):
        part, kind = match.groups()
        outer = GGUF_GLOBAL.get(part)
        return None if outer is None else f"{outer}.{kind}"
    return None
