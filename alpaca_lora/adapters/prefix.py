"""Prefix tuning: learned keys and values of P virtual tokens in every layer, the model frozen (Li and Liang 2021,
section 4.2).

    softmax(scale q [K_prefix; K]^T) [V_prefix; V]      in each layer, K_prefix and V_prefix (P, K, E) trained

Keys are used as they are, not rotated: in PEFT's form they stand in the cache at positions 0 to P - 1 and the row
begins at P. So the keys and values that a text has there make the model behave as if the text stood before every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from alpaca_lora.adapters.linear_adapter import seeded
from alpaca_lora.adapters.virtual_tokens import KEY, VirtualTokenAdapter, VirtualTokens, keys_values_of
from alpaca_lora.errors import AdapterError
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.decoder import CausalLM


class PlainPrefix(VirtualTokens):
    """Keys and values themselves: a row of the table is PEFT's (L, 2, K, E) of one virtual token, flat."""

    def __init__(self, start: torch.Tensor, model: CausalLM) -> None:
        super().__init__(start)
        config = model.config
        self._shape = (self.length, config.num_layers, 2, config.num_key_value_heads, config.head_dim)
        self._dtype = model.embeddings.weight.dtype
        self._make()

    def _make(self) -> None:
        self.prompt_embeddings = nn.Parameter(self.start.clone())

    def table(self) -> torch.Tensor:
        return self.prompt_embeddings

    def tensors(self) -> dict[str, nn.Parameter]:
        return {KEY: self.prompt_embeddings}

    def keys_values(self) -> list[KeysValues]:
        """Of each layer, (P, K, E) in the model's dtype."""
        layers = self.table().to(self._dtype).view(self._shape).unbind(1)
        return [(pair[:, 0], pair[:, 1]) for pair in layers]

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.length}"


class ProjectedPrefix(PlainPrefix):
    """start + W2 tanh(W1 e + b1) + b2 with an embedding e for each virtual token (Li and Liang 2021, section 4.3).

    W2 and b2 begin at zero, so the prefix begins as the text's own keys and values, whatever the width.
    """

    def __init__(self, start: torch.Tensor, model: CausalLM, hidden_size: int, seed: int) -> None:
        self._sizes = model.config.num_key_value_heads * model.config.head_dim, hidden_size
        self._generator = seeded(seed, "projection", KEY)
        super().__init__(start, model)

    def _make(self) -> None:
        width, hidden = self._sizes
        device = self.start.device
        self.embedding = nn.Embedding(self.length, width, device=device)
        inner = nn.Linear(width, hidden, device=device)
        outer = nn.Linear(hidden, self.start.shape[1], device=device)
        self.transform = nn.Sequential(inner, nn.Tanh(), outer)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(self.embedding.weight.shape, generator=self._generator))
            for one in (inner.weight, inner.bias):
                one.copy_((torch.rand(one.shape, generator=self._generator) * 2 - 1) * width**-0.5)
            for one in (outer.weight, outer.bias):
                one.zero_()

    def table(self) -> torch.Tensor:
        return self.start + self.transform(self.embedding.weight)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {f"prompt_encoder.{name}": parameter for name, parameter in self.named_parameters()}


class PrefixTuning(VirtualTokenAdapter):
    """The adapter. See `adapters.base.Adapter`; what is saved is the plain prefix, however it was trained."""

    method = "prefix"
    peft_type = "PREFIX_TUNING"
    known = frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})

    @classmethod
    def _widths(cls, model: CausalLM) -> dict[str, int]:
        config = model.config
        return {
            "token_dim": _key_width(config), "num_layers": config.num_layers,
            "num_attention_heads": config.num_key_value_heads,
        }  # fmt: skip

    @classmethod
    def _columns(cls, model: CausalLM) -> int:
        return model.config.num_layers * 2 * _key_width(model.config)

    @classmethod
    def _config(cls, model: CausalLM) -> dict[str, Any]:
        return {"encoder_hidden_size": _key_width(model.config), "prefix_projection": False}

    @classmethod
    def _new_tokens(cls, model: CausalLM, ids_P: torch.Tensor, options: Any, seed: int) -> VirtualTokens:
        """The keys and values that the frozen model has for these tokens."""
        pairs = [torch.stack(pair, 1) for pair in keys_values_of(model, model.embed(ids_P))]
        start = torch.stack(pairs, 1).flatten(1)
        if not options.prefix_projection:
            return PlainPrefix(start, model)
        return ProjectedPrefix(start, model, options.prefix_hidden_size or model.config.hidden_size, seed)

    @classmethod
    def _saved_tokens(cls, model: CausalLM, table: torch.Tensor) -> VirtualTokens:
        tokens = PlainPrefix(torch.zeros_like(table), model)  # no start is known: all of it counts as moved
        tokens.prompt_embeddings.data.copy_(table)
        return tokens

    @classmethod
    def from_peft(cls, model: nn.Module, config: dict[str, Any], *args: Any, **more: Any) -> PrefixTuning:
        """As `VirtualTokenAdapter.from_peft`. PEFT, too, saves the plain prefix of one that was trained through its
        network, and says so only by ``inference_mode``: here, and in what we write of it, it is plain.
        """
        return super().from_peft(model, {**config, "prefix_projection": False}, *args, **more)

    def _moved(self) -> dict[str, float]:
        """Of each decoder layer: norm of its keys' and values' change."""
        if self.tokens is None:
            return {}
        with torch.no_grad():
            change = (self.tokens.table() - self.tokens.start).unflatten(1, (self.model.config.num_layers, -1))
            norms = change.norm(dim=(0, 2)).tolist()
        names = {id(module): name for name, module in self.model.named_modules()}
        return {names[id(layer)]: norm for layer, norm in zip(self.model.layers, norms, strict=True)}

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As `Adapter.load_state_tensors`. A table does not say what network made it: the network stays, what it adds
        to moves, so that the sum is the table. Resuming restores the trained parameters themselves.
        """
        if not isinstance(self.tokens, ProjectedPrefix) or KEY not in tensors:
            return super().load_state_tensors(tensors)
        with torch.no_grad():
            offset = self.tokens.table() - self.tokens.start
        own = {name: parameter.detach() for name, parameter in self.tokens.tensors().items()}
        _check_shape(tensors[KEY], offset.shape)
        super().load_state_tensors({**own, **{key: value for key, value in tensors.items() if key != KEY}})
        self.tokens.start.copy_(tensors[KEY] - offset)


def _check_shape(table: torch.Tensor, shape: torch.Size) -> None:
    if table.shape != shape:
        raise AdapterError(f"shape {tuple(table.shape)}", field=KEY, expected=f"{tuple(shape)}")


def _key_width(config: ModelConfig) -> int:
    return config.num_key_value_heads * config.head_dim
