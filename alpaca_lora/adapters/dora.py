"""DoRA: W' = m (W + s B A) / ||W + s B A||, norms of rows, m trained beside A and B (Liu et al. 2024, equation 5).

The norm is a constant in the backward pass (section 4.3), and it is never taken of a dense matrix:
    ||W + s B A||_o^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T
The first term is computed once, the others cost R columns. Knows what LoRA knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from alpaca_lora.adapters.linear_adapter import AdaptedLinear, base_weight, device_of, features
from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.lora_config import Setting
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear, initial_A, salt_of
from alpaca_lora.errors import NumericalError
from alpaca_lora.kernels.scale import scale_columns, scale_learn

MAGNITUDE = "lora_magnitude_vector"
TINY = 1e-24  # square of a norm below which a row has no direction: an all-zero row stays zero instead of NaN


class DoRALinear(LoRALinear):
    """y = g (x W^T + s drop(x) A^T B^T) + b with g = m / ||W + s B A||; magnitude (out,) float32 starts as ||W||.

    Under dropout only the update's input is dropped. PEFT drops the base's too in the part (g - 1) x W^T; without
    dropout the two are equal.
    """

    suffixes: ClassVar[Mapping[str, str]] = {**LoRALinear.suffixes, MAGNITUDE: "magnitude"}

    def __init__(
        self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float, rows: DropoutRows, salt: int,
        magnitude: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, lora_A, lora_B, scale, rows, salt)
        with torch.no_grad():
            norm_O = torch.linalg.vector_norm(base_weight(base), dim=1, dtype=torch.float32)
        self.register_buffer("base_norm", norm_O, persistent=False)
        self.magnitude = nn.Parameter(norm_O.clone() if magnitude is None else magnitude)
        self._kept: tuple[tuple[int, int], torch.Tensor] | None = None

    def finish(self, z_TO: torch.Tensor) -> torch.Tensor:
        return scale_columns(z_TO, self.magnitude, self.inverse_norm(), getattr(self.base, "bias", None))

    def up(self) -> torch.Tensor:
        """g B, with g a constant for B: W' = g (W + s B A)."""
        return (self.magnitude.detach() * self.inverse_norm())[:, None] * self.lora_B

    def learn(self, y_TO: torch.Tensor) -> torch.Tensor:
        """The magnitude's gradient from the output itself, which is a multiple of it: for schemes whose scales follow
        the weights of a row, Q(m v) = m Q(v), so this is the derivative of the quantized weight, too.
        """
        return scale_learn(y_TO, self.magnitude, getattr(self.base, "bias", None))

    def inverse_norm(self) -> torch.Tensor:
        """1 / ||W + s B A|| of each row (out,), float32, a constant.

        Kept where nobody changes the factors unseen: they are not trained (every token of a decoded text pays nothing),
        or our trainer says by `set_rows` when they change (a checkpointed layer that runs again in the backward pass
        pays nothing). In somebody's own loop it is computed each time: a write through ``.data`` leaves no trace.
        """
        rows, trained = self.rows, self.lora_A.requires_grad or self.lora_B.requires_grad
        told = rows.keys_T is not None or (rows.announced and not torch.is_grad_enabled())
        keeps = not rows.automatic and (told or not trained)
        versions = _version(self.lora_A), _version(self.lora_B)
        if keeps and self._kept is not None and self._kept[0] == versions:
            return self._kept[1]
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be asked for outside of inference mode
            inverse_O = self.squares()[0].clamp_min_(TINY).rsqrt_()
        self._kept = (versions, inverse_O) if keeps else None
        return inverse_O

    @torch.no_grad()
    def squares(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """||V||^2, V . W - ||W||^2 and ||V - W||^2 of each row (out,), float32, with V = W + s B A."""
        weight_OD = base_weight(self.base)
        a_RD, b_OR = self.lora_A.to(weight_OD.dtype), self.lora_B
        along_O = (weight_OD @ a_RD.t()).float().mul_(b_OR).sum(1).mul_(self.scale)
        a_RD = a_RD.float()
        update_O = (b_OR @ (a_RD @ a_RD.t())).mul_(b_OR).sum(1).mul_(self.scale**2)
        return self._base_norm().square() + 2 * along_O + update_O, along_O, update_O

    def _base_norm(self) -> torch.Tensor:
        return self.get_buffer("base_norm")

    def weights_changed(self) -> None:
        self._kept = None

    def merged_weight(self) -> torch.Tensor:
        """m (W + s B A) / ||W + s B A|| (out, in) in float32, the norm of the dense sum, outside of autograd."""
        with torch.no_grad():
            summed = super().merged_weight()
            norm_O = torch.linalg.vector_norm(summed, dim=1).clamp_min_(TINY**0.5)
            return summed.mul_((self.magnitude / norm_O)[:, None])

    @torch.no_grad()
    def change(self) -> float:
        """Norm of W' - W, from rank-wide products; 0 as long as neither magnitude nor lora_B has moved."""
        square_O, along_O, update_O = self.squares()
        norm_O, start_O = square_O.clamp_min(TINY).sqrt(), self._base_norm().clamp_min(TINY**0.5)
        factor_O = self.magnitude / norm_O
        # g - 1 without the difference of two numbers near 1: ||V|| - ||W|| = (||V||^2 - ||W||^2) / (||V|| + ||W||)
        beyond_O = (self.magnitude - self._base_norm() - (2 * along_O + update_O) / (norm_O + start_O)) / norm_O
        squares_O = (beyond_O * self._base_norm()).square() + factor_O * (2 * beyond_O * along_O + factor_O * update_O)
        return float(squares_O.clamp_min_(0).sum().sqrt())

    @torch.no_grad()
    def changes(self) -> tuple[float, float]:
        """Means over rows of |m - ||W||| / ||W|| and of 1 - cos(V, W): how far magnitude and direction went."""
        square_O, along_O, update_O = (x.double() for x in self.squares())
        start_O = self._base_norm().double().clamp_min(TINY**0.5)
        magnitude = ((self.magnitude - start_O).abs() / start_O).mean()
        # sin^2 of the angle is what of the update is not along W, over ||V||^2; 1 - cos = sin^2 / (1 + cos)
        across_O = (update_O - (along_O / start_O).square()).clamp_min(0) / square_O.clamp_min(TINY)
        cos_O = (start_O + along_O / start_O) / square_O.clamp_min(TINY).sqrt()
        return float(magnitude), float(torch.where(cos_O > 0, across_O / (1 + cos_O), 1 - cos_O).mean())


def _version(tensor: torch.Tensor) -> int:
    """Counts torch's own writes into a tensor; 0 for those that do not count."""
    return 0 if tensor.is_inference() else tensor._version


class Dora(Lora):
    """The adapter: all `DoRALinear`s of one model. In PEFT's files a LORA with use_dora."""

    method = "dora"

    @classmethod
    def _config(cls, model: nn.Module, options: Any, targets: list[str]) -> dict[str, Any]:
        return {**super()._config(model, options, targets), "use_dora": True}

    @classmethod
    def _new_layer(cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, seed: int) -> AdaptedLinear:
        in_features, out_features = features(base)
        a = initial_A(seed, name, setting.rank, in_features).to(device_of(base))
        b = torch.zeros(out_features, setting.rank, device=a.device)
        return DoRALinear(base, a, b, setting.scale, rows, salt_of(name))

    @classmethod
    def _saved_layer(
        cls, name: str, base: nn.Module, setting: Setting, rows: DropoutRows, tensors: Mapping[str, torch.Tensor]
    ) -> AdaptedLinear:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return DoRALinear(base, a, b, setting.scale, rows, salt_of(name), tensors[MAGNITUDE])

    @classmethod
    def _shapes(cls, base: nn.Module, setting: Setting) -> dict[str, tuple[int, ...]]:
        return {**super()._shapes(base, setting), MAGNITUDE: (features(base)[1],)}

    def check_acted(self) -> None:
        """As `Lora.check_acted`; NumericalError when a module's magnitude or its direction stood still: that would be
        LoRA, or a scaling.
        """
        super().check_acted()
        for what, still in (
            ("magnitude", [name for name, layer in self.layers.items() if not _magnitude_moved(layer)]),
            ("direction", [name for name, layer in self.layers.items() if not bool(layer.lora_B.any())]),
        ):
            if still:
                raise NumericalError(
                    f"the {what} of {len(still)} of {len(self.layers)} modules did not move: {', '.join(still[:5])}",
                    fix="check that the learning rate is not negligible",
                )

    def facts(self) -> list[tuple[str, str]]:
        """LoRA's, and how far magnitudes and directions went."""
        changes = [layer.changes() for layer in self.layers.values()]
        magnitude, direction = (sum(column) / len(changes) for column in zip(*changes, strict=True))
        return [
            *super().facts(),
            ("magnitude change", f"{100 * magnitude:.3g} %, mean over rows"),
            ("direction change", f"1 - cosine {direction:.3g}, mean over rows"),
        ]


def _magnitude_moved(layer: DoRALinear) -> bool:
    return not torch.equal(layer.magnitude.detach(), layer.get_buffer("base_norm"))
