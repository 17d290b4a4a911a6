"""AdamW over one flat float32 buffer; knows names and shapes, nothing of models.

Parameters and their gradients are views of two flat buffers: a step is a dozen large operations instead of a dozen
for each of hundreds of small tensors. Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019),
algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from alpaca_lora.errors import ModelFileError

ALIGNMENT = 16  # floats: each view begins on a 64-byte line, as a tensor of its own would


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one parameter lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    start: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


class FlatAdamW:
    """AdamW, decoupled weight decay, bias-corrected; equal to ``torch.optim.AdamW`` up to float32 rounding.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p (1 - lr decay) - lr m' / (sqrt(v') + eps), primes
    bias-corrected.

    Makes the given parameters views of one buffer; who moves a parameter afterwards (``module.to(...)``) takes it
    out of the optimizer's reach, which `step` notices. ``updates`` counts the steps taken.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *,
        beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.updates = 0
        self._slots: list[_Slot] = []
        size = 0
        for name, parameter in named_parameters:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}: trained parameters are float32"
            self._slots.append(_Slot(name, parameter, size))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        assert self._slots, "nothing to train"
        device = self._slots[0].parameter.device
        # the padding between views stays zero in all four, so sums over the buffers are sums over the parameters
        self._weights, self._grads, self._mean, self._square = (
            torch.zeros(size, dtype=torch.float32, device=device) for _ in range(4)
        )
        for slot in self._slots:
            view = slot.view(self._weights)
            view.copy_(slot.parameter.detach())
            slot.parameter.data = view
            slot.parameter.grad = slot.view(self._grads)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) in the order given."""
        return [(slot.name, slot.parameter) for slot in self._slots]

    def zero_grad(self) -> None:
        self._grads.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of the whole gradient; not finite if any element is not."""
        return float(torch.linalg.vector_norm(self._grads))

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradient, of norm ``norm``, down to ``max_norm``; 0 leaves it."""
        if max_norm and norm > max_norm:
            self._grads.mul_(max_norm / norm)

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient has an Inf or NaN."""
        return [s.name for s in self._slots if not bool(torch.isfinite(s.view(self._grads)).all())]

    def step(self, learning_rate: float) -> None:
        """One update of all parameters with the gradient as it stands."""
        first = self._slots[0]
        assert first.parameter.data_ptr() == first.view(self._weights).data_ptr(), f"{first.name} was moved"
        self.updates += 1
        correction1, correction2 = 1 - self.beta1**self.updates, 1 - self.beta2**self.updates
        if self.weight_decay:
            self._weights.mul_(1 - learning_rate * self.weight_decay)
        self._mean.lerp_(self._grads, 1 - self.beta1)
        self._square.mul_(self.beta2).addcmul_(self._grads, self._grads, value=1 - self.beta2)
        denominator = self._square.sqrt().mul_(correction2**-0.5).add_(self.epsilon)
        self._weights.addcdiv_(self._mean, denominator, value=-learning_rate / correction1)

    def weights(self) -> torch.Tensor:
        """A copy of the flat weights; `load_weights` takes it back."""
        return self._weights.clone()

    def load_weights(self, weights: torch.Tensor) -> None:
        self._weights.copy_(weights)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All state by parameter name: ``weight.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``; views, on the
        optimizer's device.
        """
        return {
            f"{kind}.{slot.name}": slot.view(flat) for kind, flat in self._buffers().items() for slot in self._slots
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor], *, updates: int, file: str) -> None:
        """Take back `state_tensors`, in any order. ModelFileError naming what is missing, extra or misshapen."""
        expected = self.state_tensors()
        problems = [f"{name} is missing" for name in expected if name not in tensors]
        problems += [f"{name} is unknown" for name in tensors if name not in expected]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(view.shape)}"
            for name, view in expected.items()
            if name in tensors and tensors[name].shape != view.shape
        ]
        if problems:
            shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            raise ModelFileError(shown, file=file, expected="the tensors of this adapter and base model")
        for name, view in expected.items():
            view.copy_(tensors[name])
        self.updates = updates

    def flat_weights(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weights out of `state_tensors` as `load_weights` takes them: those of the best checkpoint, say."""
        flat = torch.zeros_like(self._weights)
        for slot in self._slots:
            slot.view(flat).copy_(tensors[f"weight.{slot.name}"])
        return flat

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {"weight": self._weights, "exp_avg": self._mean, "exp_avg_sq": self._square}
