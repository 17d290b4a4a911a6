"""What a user may choose about the form of the base's weights. No torch here: `--help` and configuration errors must
not pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from alpaca_lora.config import Options
from alpaca_lora.errors import ConfigError

# schemes that need nothing but the weights
OnLoad = Literal["nf4", "fp4", "fp8", "int8", "int4", "int8_dynamic"]
SchemeName = Literal["nf4", "fp4", "fp8", "int8", "int4", "int8_dynamic", "int8_static", "mixed"]
FOUR_BIT = frozenset(("nf4", "fp4"))
# scheme -> how its codes can be chosen, where there is a choice; `Scheme.roundings` of the scheme itself
ROUNDINGS: Mapping[str, tuple[str, ...]] = {
    "int4": ("nearest", "gptq", "awq"), "mixed": ("nearest", "gptq", "awq"), "nf4": ("nearest", "gptq"),
    "fp4": ("nearest", "gptq"),
}  # fmt: skip
# setting of a scheme -> the schemes that have it
READ_BY: Mapping[str, frozenset[str]] = {
    "block_size": FOUR_BIT, "double_quant": FOUR_BIT, "group_size": frozenset(("int4",)),
    "symmetric": frozenset(("int4",)), "fp8_format": frozenset(("fp8",)), "observer": frozenset(("int8_static",)),
    "percentile": frozenset(("int8_static",)),
}  # fmt: skip


class QuantizationOptions(Options):
    """Of commands that load a base model: in which form its linears are kept."""

    quantize: OnLoad | None = Field(
        None, description="quantize the base while it is loaded: every linear but the head; none: as it is stored"
    )
    quantization_plan: str | None = Field(
        None,
        description="quantize the base while it is loaded by this plan, a YAML or JSON file; see docs/quantization.md",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> QuantizationOptions:
        if self.quantize is not None and self.quantization_plan is not None:
            raise ConfigError("stands beside quantization_plan", field="quantize", fix="leave one of both out")
        return self


class SchemeOptions(Options):
    """Settings of the schemes that need nothing but the weights; none: the scheme's own default."""

    block_size: int | None = Field(None, ge=16, le=4096, description="nf4, fp4: weights that share a scale (64)")
    double_quant: bool | None = Field(None, description="nf4, fp4: the scales themselves in 8 bits (true)")
    group_size: int | None = Field(
        None, ge=8, le=65536, description="int4: inputs that share a scale (128, or the next half that divides)"
    )
    symmetric: bool | None = Field(None, description="int4: no zero points (false)")
    fp8_format: Literal["e4m3", "e5m2"] | None = Field(None, description="fp8: bits of exponent and fraction (e4m3)")

    @classmethod
    def not_of(cls, scheme: str) -> dict[str, str]:
        """Key -> why it has no effect, of the settings that ``scheme`` does not have."""
        foreign = [key for key, by in READ_BY.items() if key in cls.model_fields and scheme not in by]
        return dict.fromkeys(foreign, f"scheme {scheme} does not read it")


class QatOptions(QuantizationOptions, SchemeOptions):
    """Of commands that train: the base's form, or the one that is trained for."""

    quantization_aware: OnLoad | None = Field(
        None, description="train for this scheme: the forward pass sees base and adapter quantized as one, the base "
        "itself stays dense; `quantize --lora_weights` then gives exactly the weights that were trained with",
    )  # fmt: skip

    @model_validator(mode="after")
    def _of_a_dense_base(self) -> QatOptions:
        beside = "quantize" if self.quantize is not None else "quantization_plan"
        if self.quantization_aware is not None and getattr(self, beside) is not None:
            raise ConfigError(
                f"stands beside {beside}", field="quantization_aware", expected="a dense base",
                fix=f"leave {beside} out; quantize the trained model afterwards",
            )  # fmt: skip
        return self

    def unused(self) -> dict[str, str]:
        if self.quantization_aware is not None:
            return self.not_of(self.quantization_aware)
        return dict.fromkeys(SchemeOptions.model_fields, "quantization_aware is none")


class QuantizeOptions(SchemeOptions):
    """Of the command `quantize`."""

    scheme: SchemeName | None = Field(None, description="how every linear but the head is stored; mixed: each its own")
    plan: str | None = Field(
        None, description="a plan, a YAML or JSON file, in place of scheme; see docs/quantization.md"
    )
    output_dir: str = Field(min_length=1, description="folder to write; it must not hold a model yet")
    lora_weights: str | None = Field(
        None, min_length=1, description="adapter folder to fold into the weights first, in float32"
    )
    observer: Literal["minmax", "percentile", "mse"] | None = Field(
        None, description="int8_static: how the range of the activations is found on the calibration rows (mse)"
    )
    percentile: float | None = Field(None, gt=50, le=100, description="int8_static with observer percentile (99.9)")
    rounding: Literal["nearest", "gptq", "awq"] = Field(
        "nearest",
        description="how codes are chosen: the nearest, or on calibration rows so that they make up for each "
        "other's errors: gptq (int4, nf4, fp4), awq (int4)",
    )
    calibration_data: str | None = Field(
        None, min_length=1, description="rows that the model is run on: a text file, or any data file"
    )
    calibration_tokens: int = Field(16384, ge=1, le=10_000_000, description="how many tokens of them")
    bits: float | None = Field(
        None, gt=0, le=16, description="mixed: the most bits per weight on average, for example 4.5"
    )
    max_perplexity_increase: float | None = Field(
        None, gt=0, le=10, description="mixed: the most that the perplexity may grow, for example 0.01 for 1 %"
    )
    max_shard_gb: float = Field(4.0, gt=0, le=1_000_000, description="size of a weight file, in GB (1e9 bytes)")

    @model_validator(mode="after")
    def _what_belongs_together(self) -> QuantizeOptions:
        if (self.scheme is None) == (self.plan is None):
            raise ConfigError("scheme or plan", field="scheme", expected="one of both", fix="--scheme nf4, for example")
        if self.scheme == "mixed" and (self.bits is None) == (self.max_perplexity_increase is None):
            raise ConfigError("mixed needs a budget", field="bits", expected="bits or max_perplexity_increase")
        if self.needs_calibration and self.calibration_data is None:
            raise ConfigError(
                "missing: this is made by running the model on rows", field="calibration_data",
                expected="a text file, or any data file",
            )  # fmt: skip
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to be run on sample rows, by the scheme's name alone."""
        return self.scheme in ("int8_static", "mixed") or self.rounding != "nearest"

    def unused(self) -> dict[str, str]:
        name = self.scheme if self.scheme is not None else "plan"
        why = self.not_of(name)
        if self.scheme is not None and self.rounding not in ROUNDINGS.get(self.scheme, ()):
            why["rounding"] = f"scheme {name} is made otherwise"
        if self.scheme != "mixed":
            why |= dict.fromkeys(("bits", "max_perplexity_increase"), f"scheme {name} does not read it")
        if not self.needs_calibration and self.plan is None:
            reason = f"scheme {name} needs no calibration rows"
            why |= dict.fromkeys(("calibration_data", "calibration_tokens"), reason)
        if self.observer != "percentile":
            why["percentile"] = "observer is not percentile"
        return why
