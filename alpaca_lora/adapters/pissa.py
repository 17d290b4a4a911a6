"""PiSSA: A and B start as the principal singular values and vectors of W (Meng et al. 2024, equations 2 to 4).

The paper takes what A and B start from out of W. Here the base is never changed; the start is subtracted beside it:
    y = x W^T + b + s drop(x) (A^T B^T - A0^T B0^T)
so nothing is rounded into W's dtype, a quantized base serves too, and the file is a plain LoRA of rank 2R on the base
as it is, [A; A0] and [B -B0], which is PEFT's own conversion. Knows what LoRA knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from alpaca_lora.adapters.base import EncodeText, Kept
from alpaca_lora.adapters.linear_adapter import PEFT_PREFIX, AdaptedLinear, base_weight, device_of, features
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.lora_config import Setting, check_config
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear, salt_of
from alpaca_lora.errors import AdapterError, ConfigError, NumericalError
from alpaca_lora.kernels.truncated_svd import truncated_svd


class PissaLinear(LoRALinear):
    """A `LoRALinear` with the pair it started from, of opposite sign, as a constant: start_A (R, in) is A0, start_B
    (out, R) is -B0.

    Under dropout this differs from PEFT's form, whose base without the principal part sees the whole input: here
    dropout leaves the function at the start the base's, whatever it drops. Without dropout the two are equal.
    """

    def __init__(
        self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, start_A: torch.Tensor,
        start_B: torch.Tensor, scale: float, rows: DropoutRows, salt: int,
    ) -> None:  # fmt: skip
        super().__init__(base, lora_A, lora_B, scale, rows, salt)
        self.register_buffer("start_A", start_A, persistent=False)
        self.register_buffer("start_B", start_B, persistent=False)

    @property
    def constant(self) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.get_buffer("start_A"), self.get_buffer("start_B")

    @torch.no_grad()
    def set_start(self, start_A: torch.Tensor, start_B: torch.Tensor) -> None:
        """Put another constant pair in the place of this one."""
        self.get_buffer("start_A").copy_(start_A)
        self.get_buffer("start_B").copy_(start_B)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[A; A0] (2R, in) and [B -B0] (out, 2R): the whole update over s is their product."""
        start_A, start_B = self.constant
        return torch.cat((self.lora_A.detach(), start_A)), torch.cat((self.lora_B.detach(), start_B), dim=1)

    def merged_weight(self) -> torch.Tensor:
        """W + s (B A - B0 A0) (out, in) in float32, outside of autograd."""
        a, b = self.factors()
        return torch.addmm(base_weight(self.base).float(), b, a, alpha=self.scale)

    def update_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[A; A - A0] and [B - B0, B0], so that their product is exactly zero as long as neither has moved: the
        difference of two large products would never quite be.
        """
        start_A, start_B = self.constant
        a, b = self.lora_A.detach(), self.lora_B.detach()
        return torch.cat((a, a - start_A)), torch.cat((b + start_B, -start_B), dim=1)


class Pissa(Lora):
    """The adapter: all `PissaLinear`s of one model. Its config and tensors are those of the file, a LoRA of rank 2R;
    what is trained is the half of it called lora_A and lora_B, of rank R.
    """

    method = "pissa"

    @staticmethod
    def _check(config: Mapping[str, Any], *, file: Any = None) -> list[str]:
        """As `lora_config.check_config`, of what the user asked for and of what it is saved as."""
        messages = check_config(config, file=file)
        if file is None:
            try:
                check_config(converted(config))
            except ConfigError as error:
                raise ConfigError(
                    f"method pissa is saved as a LoRA of twice the rank, whose {error.field} {error.what}",
                    field=error.field, expected=error.expected, fix="lower it",
                ) from error  # fmt: skip
        return messages

    @classmethod
    def attach(cls, model: nn.Module, options: Any, *, seed: int, encode_text: EncodeText | None = None) -> Self:
        """As `Lora.attach`. ConfigError, besides, for a rank above that of a weight: it has no more directions."""
        adapter = super().attach(model, options, seed=seed, encode_text=encode_text)
        adapter.config = converted(adapter.config)
        return adapter

    @classmethod
    def _new_layer(cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, seed: int) -> AdaptedLinear:
        if setting.rank > (widest := min(features(base))):
            raise ConfigError(
                f"rank {setting.rank} is larger than the rank that the weight of {name} can have, {widest}",
                field="lora_r", fix="lower it, or give that module its own with rank_pattern",
            )  # fmt: skip
        a, b = principal_factors(base_weight(base), setting, seed, name)
        a, b = a.to(device_of(base)), b.to(device_of(base))
        return PissaLinear(base, a, b, a.clone(), -b, setting.scale, rows, salt_of(name))

    @classmethod
    def _saved_layer(
        cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, tensors: Mapping[str, torch.Tensor]
    ) -> AdaptedLinear:
        if setting.rank % 2:
            raise AdapterError(f"{name}: rank {setting.rank} is odd", expected="trained and constant half, of one rank")
        (a, start_A), (b, start_B) = _halves(tensors["lora_A.weight"], 0), _halves(tensors["lora_B.weight"], 1)
        return PissaLinear(base, a, b, start_A, start_B, setting.scale, rows, salt_of(name))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What the file holds: both halves side by side."""
        found = super().state_tensors()
        for name, layer in self.layers.items():
            a, b = layer.factors()
            for suffix, factor in (("lora_A.weight", a), ("lora_B.weight", b)):
                found[f"{PEFT_PREFIX}{name}.{suffix}"] = factor.to("cpu", torch.float32, copy=True)
        return found

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_tensors` gave. AdapterError when keys or shapes are not those of this adapter."""
        own, trained, starts = self.state_tensors(), dict(tensors), {}
        for name in self.layers:
            for suffix, dim in (("lora_A.weight", 0), ("lora_B.weight", 1)):
                key = f"{PEFT_PREFIX}{name}.{suffix}"
                # a tensor of another shape goes on whole, and is refused by its name
                if key in tensors and tensors[key].shape == own[key].shape:
                    trained[key], starts[key] = _halves(tensors[key], dim)
        super().load_state_tensors(trained)
        for name, layer in self.layers.items():
            key = f"{PEFT_PREFIX}{name}"
            layer.set_start(starts[f"{key}.lora_A.weight"], starts[f"{key}.lora_B.weight"])

    def extra_state(self) -> dict[str, torch.Tensor]:
        """The constant pairs: another machine's decomposition may differ in the last bit."""
        return {
            f"{name}.{which}": tensor.clone()
            for name, layer in self.layers.items()
            for which, tensor in zip(("start_A", "start_B"), layer.constant, strict=True)
        }

    def load_extra_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Kept]:
        own = self.extra_state()
        wrong = sorted(own.keys() ^ tensors.keys()) or [key for key in own if own[key].shape != tensors[key].shape]
        if wrong:
            raise AdapterError("not the state of this adapter", field=wrong[0], expected="the run's own checkpoint")
        for name, layer in self.layers.items():
            layer.set_start(tensors[f"{name}.start_A"], tensors[f"{name}.start_B"])
        return {}

    def check_acted(self) -> None:
        """As `Lora.check_acted`; NumericalError when a factor did not leave its start: both get a gradient from the
        first step on.
        """
        super().check_acted()
        still = [
            f"{name}.{which}"
            for name, layer in self.layers.items()
            for which, moved in (
                ("lora_A", not torch.equal(layer.lora_A, layer.constant[0])),
                ("lora_B", not torch.equal(layer.lora_B, -layer.constant[1])),
            )
            if not moved
        ]
        if still:
            raise NumericalError(
                f"{len(still)} factors are still the principal ones of the base: {', '.join(still[:5])}",
                fix="check that the learning rate is not negligible",
            )

    def facts(self) -> list[tuple[str, str]]:
        """LoRA's, and what part of the base's weights, by squared norm, was principal and so trained."""
        shares = [
            float((layer.scale * layer.constant[1].norm(dim=0) * layer.constant[0].norm(dim=1)).square().sum())
            / float(base_weight(layer.base).float().square().sum().clamp_min(1e-30))
            for layer in self.layers.values()
        ]
        share = 100 * sum(shares) / len(shares)
        return [*super().facts(), ("principal part", f"{share:.1f} % of the weights' squared norm, mean over modules")]


def principal_factors(
    weight_OD: torch.Tensor, setting: Setting, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in) = sqrt(S / s) V^T and B (out, R) = U sqrt(S / s) of the R largest singular values; float32, on the CPU.
    A function of the arguments alone.
    """
    u_OR, values_R, vt_RD = truncated_svd(weight_OD, setting.rank, f"pissa\0{seed}\0{name}")
    root_R = (values_R / setting.scale).sqrt()
    return (root_R[:, None] * vt_RD).contiguous(), (u_OR * root_R).contiguous()


def converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the saved LoRA: ranks doubled, alphas such that the scale of every module stays."""
    grown = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": grown * config["lora_alpha"],
        "rank_pattern": {pattern: 2 * rank for pattern, rank in config["rank_pattern"].items()},
        "alpha_pattern": {pattern: grown * alpha for pattern, alpha in config["alpha_pattern"].items()},
    }


def _halves(tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained and the constant half, each contiguous."""
    first, second = tensor.chunk(2, dim)
    return first.contiguous(), second.contiguous()
