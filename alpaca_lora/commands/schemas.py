"""What each command can be told: the options of the rooms it uses, composed. No torch.

A key belongs to one room; `tests/commands/test_schemas.py` holds it. A command may only describe it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from alpaca_lora.adapters.options import READ_BY, AdapterOptions
from alpaca_lora.config import Options
from alpaca_lora.data.options import DataOptions
from alpaca_lora.errors import ConfigError
from alpaca_lora.inference.options import GenerationOptions
from alpaca_lora.models.options import ModelOptions
from alpaca_lora.quantization.options import QatOptions, QuantizationOptions, QuantizeOptions
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.text.options import TextOptions
from alpaca_lora.training.options import TrainingOptions

# What a method wants otherwise than LoRA: the rates of benchmarks/tune_methods.py (table in docs/methods.md), or one
# step below the best where a longer run is safer with less. A key that the user gives always wins.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"learning_rate": 1e-2},
    "ia3": {"learning_rate": 1e-2, "lora_target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prefix": {"learning_rate": 1e-2},
    "prompt": {"learning_rate": 1e-2},
    "freeze": {"learning_rate": 3e-4},
    "bitfit": {"learning_rate": 3e-3},
    "full": {"learning_rate": 1e-4},
}


OF_GENERATION = (
    "prompt_template_name", "system_prompt", "train_on_inputs", "train_on_turns", "num_sample_answers"
)  # fmt: skip


class FinetuneConfig(ModelOptions, QatOptions, DataOptions, TextOptions, AdapterOptions, TrainingOptions):
    """Everything a training run depends on."""

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        method = data.get("method")
        # a weight that is quantized as a whole holds the update: there is no input of its own to drop
        folded = {"lora_dropout": 0.0} if data.get("quantization_aware") is not None else {}
        return {**folded, **(METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}), **data}

    @model_validator(mode="after")
    def _no_dropout_of_a_folded_update(self) -> FinetuneConfig:
        if self.quantization_aware is not None and self.lora_dropout and self.method in READ_BY["lora_dropout"]:
            raise ConfigError(
                f"is {self.lora_dropout:g} beside quantization_aware, whose weights hold the update", expected="0",
                field="lora_dropout", fix="leave it out",
            )  # fmt: skip
        return self

    def unused(self) -> dict[str, str]:
        why = QatOptions.unused(self)
        why |= {key: f"method {self.method} does not read it" for key, by in READ_BY.items() if self.method not in by}
        if self.method == "freeze" and self.trained_modules:
            why["train_last_layers"] = "trained_modules says what is trained"
        if not self.prefix_projection:
            why.setdefault("prefix_hidden_size", "prefix_projection is false")
        if self.task == "classification":
            why |= dict.fromkeys(OF_GENERATION, "task classification does not read it")
        else:
            why |= dict.fromkeys(("class_weights", "text_template"), "task generation does not read it")
        if not self.val_data_path and not self.val_set_size:
            why["early_stopping_patience"] = "there are no validation rows"
        return why


class CheckConfig(FinetuneConfig):
    """The same keys as finetune: what is checked is what would run."""


class GenerateConfig(ModelOptions, QuantizationOptions, GenerationOptions, TextOptions):
    """A base model, perhaps an adapter, and how to answer."""


class ServeConfig(ModelOptions, QuantizationOptions, ServeOptions, TextOptions):
    """A base model, adapters beside it, and how they are served."""


class MergeOptions(Options):
    """What is merged and where it is written."""

    lora_weights: str = Field(min_length=1, description="adapter folder in PEFT's format")
    output_dir: str = Field(min_length=1, description="Hugging Face folder to write; it must not hold a model yet")
    max_logit_difference: float | None = Field(
        None,
        gt=0,
        description="refuse to publish when merged and base + adapter differ by more; none: what rounding explains",
    )
    max_shard_gb: float = Field(4.0, gt=0, le=1_000_000, description="size of a weight file, in GB (1e9 bytes)")
    merge_onto: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="an adapter trained on a quantized base: merge into the weights that it saw (dequantized), or into "
        "the dense ones that these were made of; the differences of both are printed",
    )


class MergeConfig(ModelOptions, QuantizationOptions, MergeOptions):
    """A base model, an adapter, and where the merged model goes."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the merged weights, computed in float32; auto: bfloat16 only if every base weight is "
        "exactly a bfloat16 number, else float32",
    )


class QuantizeConfig(ModelOptions, QuantizeOptions, TextOptions):
    """A dense base model, the form its weights are to have, and where the folder goes."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of what stays dense (embedding, head, norms); auto: bfloat16"
    )

    def unused(self) -> dict[str, str]:
        why = super().unused()
        if "calibration_data" in why:
            why |= dict.fromkeys(("prompt_template_name", "system_prompt"), why["calibration_data"])
        return why


CombinationKind = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


class CombineOptions(Options):
    """Which adapters become one, how, and where it is written."""

    lora_weights: list[str] = Field(
        min_length=2, description="LoRA adapter folders of one base model", json_schema_extra={"commas": False}
    )
    output_dir: str = Field(min_length=1, description="adapter folder to write; it must not hold anything yet")
    combination: CombinationKind = Field(
        "cat", description="cat is the exact sum and adds up the ranks; docs/adapters.md describes the others"
    )
    combination_weights: list[float] = Field(
        [], description="factor of each adapter's update, also negative; none: one over their number, each"
    )
    density: float | None = Field(
        None, gt=0, le=1, description="ties, dare and magnitude_prune: share of each adapter's entries that is kept"
    )
    majority_sign_method: Literal["total", "frequency"] | None = Field(
        None, description="ties: the sign of the sum (total, which none means) or of the most adapters (frequency)"
    )
    svd_rank: int | None = Field(
        None, ge=1, le=16384, description="kinds with svd: rank of the result; none: the largest of the adapters"
    )
    seed: int = Field(0, ge=0, description="dare: of what is dropped")


class CombineConfig(CombineOptions):
    """Adapters, how they become one, and where it goes. No base model: only the adapters' files are read."""


class PullOptions(Options):
    """What to fetch."""

    positional_key: ClassVar[str | None] = "name"
    name: str = Field("smollm2-135m", description="alias or hub id of a model; folders and .gguf files need no pull")


class PullConfig(PullOptions):
    """The model to fetch into the cache."""


SCHEMAS: dict[str, type[Options]] = {
    "finetune": FinetuneConfig,
    "check": CheckConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "merge": MergeConfig,
    "combine": CombineConfig,
    "quantize": QuantizeConfig,
    "pull": PullConfig,
}
