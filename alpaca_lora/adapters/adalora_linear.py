"""One linear with AdaLoRA's update beside it: y = x W^T + b + s drop(x) (diag(E) A)^T B^T, equation 3 of its paper.

The penalty that keeps the rows of A and the columns of B orthogonal (equation 4) is here too.
Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn

from alpaca_lora.adapters.linear_adapter import base_weight, seeded
from alpaca_lora.adapters.lora_linear import DropoutRows, LoRALinear, salt_of
from alpaca_lora.adapters.rank_allocator import Gradients, Triplets

INITIAL_STD = 0.02  # of A and B, as in PEFT


class AdaLoRALinear(LoRALinear):
    """lora_A (R, in), lora_B (out, R), lora_E (R, 1): float32. R may shrink while it is in use, down to 0, which is the
    base alone; ``scale`` stays.
    """

    suffixes: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}

    def __init__(self, base: nn.Module, triplets: Triplets, scale: float, rows: DropoutRows, name: str) -> None:
        super().__init__(base, triplets.A, triplets.B, scale, rows, salt_of(name))
        self.lora_E = nn.Parameter(triplets.E)
        self._scaled: tuple[tuple[int, ...], torch.Tensor] | None = None  # what it was made of, diag(E) A

    @property
    def rank(self) -> int:
        return self.lora_E.shape[0]

    def down(self) -> torch.Tensor | None:
        """diag(E) A (R, in), through which E and A get their gradients; kept of an adapter that is used only."""
        if self.rank == 0:
            return None
        if torch.is_grad_enabled() or self.lora_A.requires_grad or self.lora_E.requires_grad:
            return self.lora_E * self.lora_A
        made_of = (self.lora_A.data_ptr(), self.lora_E.data_ptr(), self.lora_A._version, self.lora_E._version)
        if self._scaled is None or self._scaled[0] != made_of:
            self._scaled = made_of, self.lora_E.detach() * self.lora_A.detach()
        return self._scaled[1]

    def weights_changed(self) -> None:
        self._scaled = None

    def triplets(self) -> Triplets:
        """The weights as they are, outside of autograd."""
        return Triplets(self.lora_A.detach(), self.lora_B.detach(), self.lora_E.detach())

    def gradients(self) -> Gradients:
        """Of the weights."""
        return Gradients(self.lora_A.grad, self.lora_B.grad, self.lora_E.grad)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(diag(E) A, B), outside of autograd."""
        return self.lora_E.detach() * self.lora_A.detach(), self.lora_B.detach()

    def merged_weight(self) -> torch.Tensor:
        """W + s B diag(E) A (out, in) in float32, outside of autograd."""
        a, b = self.factors()
        return torch.addmm(base_weight(self.base).detach().float(), b, a, alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.rows.p:g}"


def initial_triplets(seed: int, name: str, rank: int, in_features: int, out_features: int) -> Triplets:
    """A and B normal, E zero; a pure function of the arguments."""
    a = torch.empty(rank, in_features).normal_(std=INITIAL_STD, generator=seeded(seed, "lora_A", name))
    b = torch.empty(out_features, rank).normal_(std=INITIAL_STD, generator=seeded(seed, "lora_B", name))
    return Triplets(a, b, torch.zeros(rank, 1))


def deviation(layers: Iterable[AdaLoRALinear]) -> torch.Tensor:
    """Mean over all A and B of ||A A^T - I|| and ||B^T B - I|| in the Frobenius norm; 0 where no rank is left.

    As in PEFT the norm is not squared, other than in equation 4. Matrices of one shape are taken together: a few nodes
    in the graph in place of six hundred.
    """
    alike: dict[tuple[str, torch.Size], list[torch.Tensor]] = {}
    for layer in layers:
        if layer.rank:
            alike.setdefault(("A", layer.lora_A.shape), []).append(layer.lora_A)
            alike.setdefault(("B", layer.lora_B.shape), []).append(layer.lora_B)
    if not alike:
        return torch.zeros(())
    norms = []
    for (factor, _), matrices in alike.items():
        stack = torch.stack(matrices)
        gram = stack @ stack.mT if factor == "A" else stack.mT @ stack
        norms.append(torch.linalg.vector_norm(gram - torch.eye(gram.shape[-1], device=gram.device), dim=(1, 2)))
    return torch.cat(norms).mean()
