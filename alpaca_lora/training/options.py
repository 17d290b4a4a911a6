"""The training room's share of the configuration. No torch here: `--help` and configuration errors must be quick."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alpaca_lora.config import Options


class TrainingOptions(Options):
    """How long to train, with which optimizer, and what to keep of it."""

    output_dir: str = Field(
        "./lora-alpaca", min_length=1, description="folder of the adapter, its checkpoints and its logs"
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="the same seed gives the same adapter, bit for bit")
    num_epochs: float = Field(
        3.0, gt=0, le=1_000_000, allow_inf_nan=False, description="passes over the training rows; 0.5 is half of one"
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps to take, in place of num_epochs")
    learning_rate: float = Field(1e-3, gt=0, le=1000, allow_inf_nan=False, description="peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after the warmup"
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="steps of linear warmup; none: 10 % of the steps, at most 100"
    )
    weight_decay: float = Field(0.0, ge=0, le=1000, allow_inf_nan=False, description="decoupled weight decay of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean of gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean of squared gradients")
    adam_epsilon: float = Field(1e-8, ge=1e-30, le=1, allow_inf_nan=False, description="added to AdamW's denominator")
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="clip the global gradient norm; 0: off")
    eval_steps: int = Field(200, ge=1, description="evaluate on the validation rows every so many steps")
    save_steps: int = Field(200, ge=1, description="save a checkpoint every so many steps")
    save_total_limit: int = Field(
        3, ge=1, description="newest checkpoints to keep, at least 2 of them good; the best one is kept as well"
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="stop after so many evaluations without a better loss; 0: never"
    )
    gradient_checkpointing: bool | Literal["auto", "norms", "mlp", "disk"] = Field(
        False, description="recompute activations in the backward pass: less memory, more time, the same result; "
        "true: all of each layer; norms: norms alone, nearly for free; mlp: these and the feed-forward; "
        "auto: of each layer as little as fits into memory; disk: norms alone, and what does not fit into memory "
        "lies in a file of output_dir",
    )  # fmt: skip
    optimizer_state: Literal["float32", "int8", "disk"] = Field(
        "float32",
        description="AdamW's averages: 8 bytes for each trained number; int8: 2 bytes, rounded; "
        "disk: none, in files beside the checkpoints, the same result as float32",
    )
    resume_from_checkpoint: str | None = Field(
        None, description="checkpoint folder to continue from, or 'auto': the newest good one of output_dir"
    )
    fresh: bool = Field(
        False, description="start anew in an output_dir that holds a run; the old run moves to previous-N/ inside it"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="classification: balanced lets a rare class weigh as much in the loss as a frequent one"
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field([], description="where to send the metrics as well")
    wandb_project: str = Field("", description="Weights & Biases project; when set, metrics are sent there")
    wandb_run_name: str = Field("", description="Weights & Biases run name")
    num_sample_answers: int = Field(3, ge=0, description="answers of the tuned model to show in report.html")
    max_memory_gb: float | None = Field(
        None,
        gt=0,
        le=1_000_000_000,
        allow_inf_nan=False,
        description="refuse a run that needs more memory; none: what is free",
    )
