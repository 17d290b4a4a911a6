"""The Llama-like decoder on a packed stream of tokens: no padding, no batch axis. `CausalLM.forward` is the formula.

Parameter names are Hugging Face's. Knows nothing of files, adapters, losses or caches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from alpaca_lora.models.activation_file import ActivationFile
from alpaca_lora.models.attention import AttentionPlan, Prefix
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.layers import MLP, Attention, Device, Embedding, RMSNorm, Rotation
from alpaca_lora.models.linear import Linear, PackedLinear, linear
from alpaca_lora.models.recompute import Level, made_again, rerun, stored
from alpaca_lora.models.rope import Rope


def width_norm(config: ModelConfig, dtype: torch.dtype | None, device: Device) -> RMSNorm:
    """The family's norm over the model width."""
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset, dtype=dtype, device=device)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, dtype=dtype, device=device)
        self.mlp = MLP(config, dtype=dtype, device=device)
        self.input_layernorm = width_norm(config, dtype, device)
        self.post_attention_layernorm = width_norm(config, dtype, device)

    def forward(
        self, x_TD: torch.Tensor, rotation: Rotation, plan: AttentionPlan, level: Level = "none"
    ) -> torch.Tensor:
        with made_again(level):
            x_TD = self.add_attention(x_TD, rotation, plan)
            return rerun(self.add_mlp, x_TD) if level == "mlp" else self.add_mlp(x_TD)

    def add_attention(self, x_TD: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        return x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, plan)

    def add_mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class SandwichLayer(DecoderLayer):
    """Gemma 3: the outputs of attention and mlp are normalised too, before they are added."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__(config, layer, dtype=dtype, device=device)
        self.pre_feedforward_layernorm = width_norm(config, dtype, device)
        self.post_feedforward_layernorm = width_norm(config, dtype, device)

    def add_attention(self, x_TD: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        return x_TD + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_TD), rotation, plan))

    def add_mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD)))


class Decoder(nn.Module):
    """The parts of `CausalLM` under Hugging Face's name ``model``."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None, device: Device = None) -> None:
        super().__init__()
        layer_class = SandwichLayer if config.sandwich_norms else DecoderLayer
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            layer_class(config, layer, dtype=dtype, device=device) for layer in range(config.num_layers)
        )
        self.norm = width_norm(config, dtype, device)


class CausalLM(nn.Module):
    """Tokens to hidden states to logits. Other architectures subclass it and keep this interface.

    ``gradient_checkpointing``: how little is kept for backward and made again there: False nothing, True all of every
    layer, or a level for each layer (models/recompute.py). ``activation_file``: where layers at "disk" keep it.
    ``prefix``: virtual tokens before every segment (adapters/prefix.py); the plan knows what that means.
    """

    prefix: Prefix | None

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None, device: Device = None) -> None:
        """Uninitialised frozen weights of ``dtype`` on ``device``; "meta" allocates nothing."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing: bool | Sequence[Level] = False
        self.activation_file = ActivationFile(Path(tempfile.gettempdir()))
        self.prefix = None
        self.score: Linear | None = None  # a classifier's head, see models/classifier.py
        self._build(config, dtype, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        )

    def _build(self, config: ModelConfig, dtype: torch.dtype | None, device: Device) -> None:
        self.model = Decoder(config, dtype=dtype, device=device)
        self.ropes = tuple(Rope(rope, config.head_dim) for rope in config.ropes)

    @property
    def embeddings(self) -> Embedding:
        """The token embedding, which is the head too when they are tied."""
        return self.model.embed_tokens

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, lowest first."""
        return self.model.layers  # pyright: ignore[reportReturnType]

    @property
    def prefix_length(self) -> int:
        """Positions that virtual tokens take before each segment."""
        return 0 if self.prefix is None else self.prefix.length

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """ids and positions (int64) of one stream -> hidden_TD after the final norm, in the weights' dtype.

        Positions are counted from each segment's own start, whether there is a prefix or not.
        """
        first = self.prefix_length
        if self.prefix is not None:
            plan, positions_T = plan.with_prefix(self.prefix), positions_T + first
        return self.final_norm(self.run_layers(self.embed(ids_T), positions_T, plan, first))

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """x_TD of tokens, as the first layer gets it but for what a position adds."""
        x_TD = self.embeddings(ids_T)
        if self.config.embedding_scale != 1.0:
            # rounded to the weights' dtype first, as Gemma was trained
            x_TD = x_TD * torch.tensor(self.config.embedding_scale, dtype=x_TD.dtype).item()
        return x_TD

    def run_layers(
        self, x_TD: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan, first_position: int = 0
    ) -> torch.Tensor:
        """All layers on embedded tokens; a segment begins at ``first_position``. Knows no prefix."""
        rotations = [rope(positions_T, x_TD.dtype, first_position) for rope in self.ropes]
        for layer, rope, level in zip(self.layers, self.config.rope_of_layer, self.levels(), strict=True):
            x_TD = self.run_layer(layer, level, x_TD, rotations[rope], plan)
        return x_TD

    def final_norm(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The norm before the head."""
        return self.model.norm(x_TD)

    def levels(self) -> Sequence[Level]:
        """What each layer makes again in the backward pass, as it stands now."""
        chosen = self.gradient_checkpointing
        if not torch.is_grad_enabled() or not chosen:
            return ("none",) * self.config.num_layers
        return ("layer",) * self.config.num_layers if chosen is True else chosen

    def run_layer(self, layer: nn.Module, level: Level, x_TD: torch.Tensor, *context: object) -> torch.Tensor:
        """One layer at its level: the seam for whoever stops backward early or offloads layers."""
        if level == "layer":
            return rerun(layer, x_TD, *context)
        with stored(self.activation_file, (layer, context)) if level == "disk" else nullcontext():
            return layer(x_TD, *context, level)

    def head_weight(self) -> torch.Tensor:
        """(V, D) of the output head; the embedding's own weight when they are tied."""
        return self.embeddings.weight if self.lm_head is None else self.lm_head.dense_weight()

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 logits_NV of the rows given: apply it only to rows whose logits are needed."""
        head = self.lm_head
        logits_NV = (linear(hidden_ND, self.head_weight()) if head is None else head(hidden_ND)).float()
        if (cap := self.config.logit_softcap) is not None:
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return logits_NV

    def num_parameters(self, *, trained_only: bool = False) -> int:
        """Number of weights, packed ones too; a tied head is counted once."""
        packed = sum(m.num_weights for m in self.modules() if isinstance(m, PackedLinear) and not trained_only)
        return packed + sum(p.numel() for p in self.parameters() if p.requires_grad or not trained_only)
