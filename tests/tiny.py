"""Tiny real things for the tests of every room: a two-layer random model and a byte tokenizer. No files, no network."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch

from alpaca_lora.models.build import build_model
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.rope import RopeConfig
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition, bos_post_processor, special

SPECIAL = {"<s>": 256, "</s>": 257, "<pad>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
VOCAB_SIZE = 264  # a few rows more than ids, as real models have

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(**overrides: Any) -> ModelConfig:
    """Two Llama layers, width 32, 4 query heads over 2 key heads, untied; any `ModelConfig` field can be overridden."""
    fields: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "ropes": (RopeConfig(10_000.0),),
        "extra": {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258},
    }
    return ModelConfig(**{**fields, **overrides})


def randomize(model: CausalLM, seed: int = 0) -> CausalLM:
    """Fill every weight from ``seed``: norms near their identity, the rest so large that logits are not flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            norm_weight = "norm" in name or ".ln_" in name
            center = 1.0 - model.config.norm_offset if norm_weight and name.endswith("weight") else 0.0
            parameter.data.copy_(center + 0.1 * noise)
        else:
            parameter.data.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def tiny_model(seed: int = 0, **overrides: Any) -> CausalLM:
    """A float32 model with random frozen weights on the CPU; ``overrides`` as in `tiny_config`."""
    return randomize(build_model(tiny_config(**overrides), dtype=torch.float32, device="cpu"), seed)


class ByteTokenizer(Tokenizer):
    """A real `Tokenizer` over UTF-8 bytes: id = byte, special tokens from 256 on. Saves and reloads as any other."""

    def __init__(self, *, add_bos: bool = True, chat_template: str | None = None) -> None:
        backend = byte_level()
        if add_bos:
            backend.post_processor = bos_post_processor(backend, "<s>")
        super().__init__(
            TokenizerDefinition(
                backend,
                "tiny",
                bos="<s>",
                eos="</s>",
                pad="<pad>",
                add_bos=add_bos,
                chat_template=chat_template,
            )
        )


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges: the id of a byte is the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE({letter: byte for byte, letter in letters.items()}, []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens([special(word) for word in SPECIAL])
    return built
