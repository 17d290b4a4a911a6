"""From a `ModelConfig` to an empty model: which class runs it, on the meta device unless told otherwise."""

from __future__ import annotations

import torch

from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.gpt_neo import GPTNeo


def build_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "meta"
) -> CausalLM:
    """A model of uninitialised frozen weights; on "meta" nothing is allocated."""
    model_class = GPTNeo if config.model_type == "gpt_neo" else CausalLM
    return model_class(config, dtype=dtype, device=device)
