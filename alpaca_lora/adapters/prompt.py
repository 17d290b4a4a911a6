"""Prompt tuning: learned embeddings of P virtual tokens before every row, the model frozen (Lester et al. 2021,
section 2).

As the virtual tokens of a causal model see themselves only, they are run through the layers once per forward, and every
row sees their keys and values: a prefix that is computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from alpaca_lora.adapters.base import EncodeText
from alpaca_lora.adapters.virtual_tokens import KEY, VirtualTokenAdapter, VirtualTokens, keys_values_of
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.decoder import CausalLM


class SoftPrompt(VirtualTokens):
    """Embeddings (P, D), as the first layer gets them: not scaled where the family scales its tokens' (Gemma)."""

    def __init__(self, start: torch.Tensor, model: CausalLM) -> None:
        super().__init__(start)
        self.prompt_embeddings = nn.Parameter(self.start.clone())
        self._dtype = model.embeddings.weight.dtype
        self._run = partial(keys_values_of, model)  # not the model itself: a module may not lie inside of itself

    def table(self) -> torch.Tensor:
        return self.prompt_embeddings

    def tensors(self) -> dict[str, nn.Parameter]:
        return {KEY: self.prompt_embeddings}

    def keys_values(self) -> list[KeysValues]:
        """Of each layer, (P, K, E) in the model's dtype."""
        return self._run(self.prompt_embeddings.to(self._dtype))

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.length}"


class PromptTuning(VirtualTokenAdapter):
    """The adapter. See `adapters.base.Adapter`."""

    method = "prompt"
    peft_type = "PROMPT_TUNING"
    known = frozenset({
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"
    })  # fmt: skip

    @classmethod
    def _widths(cls, model: CausalLM) -> dict[str, int]:
        config = model.config
        return {
            "token_dim": config.hidden_size, "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
        }  # fmt: skip

    @classmethod
    def _columns(cls, model: CausalLM) -> int:
        return model.config.hidden_size

    @classmethod
    def _config(cls, model: CausalLM) -> dict[str, Any]:
        # whatever it started from: told of a text, PEFT asks for a tokenizer even to load the finished prompt
        return {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}

    @classmethod
    def attach(
        cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None
    ) -> PromptTuning:
        """As `VirtualTokenAdapter.attach`."""
        adapter = super().attach(model, options, seed=seed, encode_text=encode_text)
        if any(rope.kind == "dynamic" for rope in adapter.model.config.ropes):
            adapter.messages.append(
                "this model turns keys by the length of the row (dynamic NTK), virtual tokens by their own: beyond the "
                "context it was trained with, PEFT's results differ"
            )
        return adapter

    @classmethod
    def _new_tokens(cls, model: CausalLM, ids_P: torch.Tensor, options: Any, seed: int) -> VirtualTokens:
        return SoftPrompt(model.embed(ids_P), model)

    @classmethod
    def _saved_tokens(cls, model: CausalLM, table: torch.Tensor) -> VirtualTokens:
        tokens = SoftPrompt(torch.zeros_like(table), model)  # no start is known: all of it counts as moved
        tokens.prompt_embeddings.data.copy_(table)
        return tokens

    def _moved(self) -> dict[str, float]:
        """Norm of the embeddings' change."""
        if self.tokens is None:
            return {}
        with torch.no_grad():
            return {KEY: float((self.tokens.table() - self.tokens.start).norm())}
