"""What a user may choose about the adapter. No torch here: `--help` and configuration errors must not pay for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from alpaca_lora.config import Options

Method = Literal["lora", "dora", "pissa", "adalora", "ia3", "prefix", "prompt", "freeze", "bitfit", "full"]
DEFAULT_TEXT = "Below is an instruction that describes a task. Write a response that completes the request."
LOW_RANK = frozenset(("lora", "dora", "pissa", "adalora"))
VIRTUAL = frozenset(("prefix", "prompt"))
# Which methods read a key; one that no method below reads is read by all.
READ_BY: Mapping[str, frozenset[str]] = {
    "lora_r": LOW_RANK, "lora_alpha": LOW_RANK, "lora_dropout": LOW_RANK, "lora_target_modules": LOW_RANK | {"ia3"},
    "use_rslora": LOW_RANK, "lora_plus_ratio": LOW_RANK, "rank_pattern": LOW_RANK, "alpha_pattern": LOW_RANK,
    "init_lora_weights": frozenset(("lora",)),
    "layers_to_transform": LOW_RANK | {"ia3"}, "modules_to_save": LOW_RANK | VIRTUAL | {"ia3"},
    "adalora_init_r": frozenset(("adalora",)), "adalora_tinit": frozenset(("adalora",)),
    "adalora_tfinal": frozenset(("adalora",)), "adalora_delta_t": frozenset(("adalora",)),
    "adalora_beta1": frozenset(("adalora",)), "adalora_beta2": frozenset(("adalora",)),
    "adalora_orth_weight": frozenset(("adalora",)), "num_virtual_tokens": VIRTUAL, "virtual_tokens_text": VIRTUAL,
    "prefix_projection": frozenset(("prefix",)), "prefix_hidden_size": frozenset(("prefix",)),
    "ia3_feedforward_modules": frozenset(("ia3",)), "train_last_layers": frozenset(("freeze",)),
    "trained_modules": frozenset(("freeze",)), "bitfit_parts": frozenset(("bitfit",)),
}  # fmt: skip


class AdapterOptions(Options):
    """The adapter's part of the configuration."""

    method: Method = Field("lora", description="adaptation method")
    lora_r: int = Field(8, ge=1, le=16384, description="rank of the update; adalora: mean rank at the end")
    lora_alpha: float = Field(
        16.0, gt=0, le=1_000_000, description="the update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))"
    )
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="share of the adapter's input dropped in training")
    lora_target_modules: list[str] = Field(
        ["q_proj", "v_proj"],
        min_length=1,
        description="linears to adapt: ends of names, whole names, regular expressions, or all-linear",
    )
    use_rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank), which suits high ranks (rank-stabilized LoRA)"
    )
    lora_plus_ratio: float = Field(
        1.0, ge=0.01, le=1000, description="learning rate of lora_B over that of lora_A (LoRA+; its authors use 16)"
    )
    rank_pattern: list[str] = Field([], description="ranks of single modules, NAME=RANK, for example q_proj=16")
    alpha_pattern: list[str] = Field([], description="alphas of single modules, NAME=ALPHA")
    init_lora_weights: Literal["default", "rounding_error"] = Field(
        "default", description="lora: where it starts: at an update of zero; or beside a quantized base with "
        "rounding_error at what quantizing took from the weights, fitted on the training rows",
    )  # fmt: skip
    layers_to_transform: list[int] = Field([], description="adapt only decoder layers of these numbers; none: all")
    modules_to_save: list[str] = Field([], description="modules to train wholly beside the adapter, by ends of names")
    adalora_init_r: int | None = Field(
        None, ge=1, le=16384, description="rank of every module at the start; none: one and a half times lora_r"
    )
    adalora_tinit: int | float = Field(
        0.1, ge=0, description="steps before ranks begin to fall: a count, or below 1 a share of all steps"
    )
    adalora_tfinal: int | float = Field(
        0.3, ge=0, description="steps after the ranks are final: a count, or below 1 a share of all steps"
    )
    adalora_delta_t: int = Field(1, ge=1, description="steps between two changes of the ranks")
    adalora_beta1: float = Field(0.85, gt=0, lt=1, description="decay of the mean sensitivity of a weight")
    adalora_beta2: float = Field(0.85, gt=0, lt=1, description="decay of the mean uncertainty of a sensitivity")
    adalora_orth_weight: float = Field(
        0.1, ge=0, le=1000, description="weight of the penalty that keeps singular vectors orthogonal"
    )
    num_virtual_tokens: int = Field(16, ge=1, le=65536, description="prefix, prompt: learned tokens before each row")
    virtual_tokens_text: str = Field(
        DEFAULT_TEXT, description="prefix, prompt: text whose activations the learned tokens start from; empty: random"
    )
    prefix_projection: bool = Field(
        False, description="prefix: learn through a two-layer network, which is folded away when it is saved"
    )
    prefix_hidden_size: int | None = Field(
        None, ge=1, le=65536, description="prefix: width of that network; none: the model's width"
    )
    ia3_feedforward_modules: list[str] = Field(
        ["down_proj"], description="ia3: targets whose input is scaled, and not their output"
    )
    train_last_layers: int = Field(
        2, ge=0, description="freeze: decoder layers to train, from the top, with the final norm; 0: the head only"
    )
    trained_modules: list[str] = Field(
        [], description="freeze: modules to train in place of the last layers: ends of names or regular expressions"
    )
    bitfit_parts: Literal["auto", "biases", "norms", "both"] = Field(
        "auto", description="bitfit: what to train; auto: the biases, or the norms where the model has no bias"
    )
