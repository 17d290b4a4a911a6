"""The table of GGUF's tensor names."""

from __future__ import annotations

import pytest

from alpaca_lora.weights.names import gguf_to_hf


@pytest.mark.parametrize(
    ("gguf", "hf"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.12.attn_k.bias", "model.layers.12.self_attn.k_proj.bias"),
        ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ("blk.3.ffn_gate_exps.weight", None),
        ("blk.03.attn_q.weight", None),
        ("blk.-1.attn_q.weight", None),
        ("blk.1.attn_q.weight.weight", None),
        ("blk.1.post_attention_norm.weight", None),
        ("position_embd.weight", None),
        ("../output.weight", None),
        ("", None),
    ],
)
def test_names(gguf: str, hf: str | None) -> None:
    assert gguf_to_hf(gguf) == hf


def test_gemma_means_other_norms_by_two_of_the_names() -> None:
    names = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"]
    assert [gguf_to_hf(f"blk.0.{name}.weight", gemma=True) for name in names] == [
        f"model.layers.0.{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    ]
