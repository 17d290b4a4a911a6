"""One linear with a low-rank update beside it: y = x W^T + b + s drop(x) A^T B^T."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from alpaca_lora.adapters.linear_adapter import AdaptedLinear, base_weight, seeded
from alpaca_lora.errors import ConfigError
from alpaca_lora.kernels.dropout import DropoutKey
from alpaca_lora.kernels.lora import lora_add, lora_learn
from alpaca_lora.models.linear import project


@dataclass(slots=True)
class DropoutRows:
    """Shared by all linears of one adapter: whose rows are in the stream. keys_T int32; None means no dropout.

    automatic: nobody calls set_rows (somebody's own loop), so a layer that is in training mode draws keys itself, from
    torch's generator. announced: somebody does (our trainer), and says by it whenever weights have changed.
    """

    p: float
    keys_T: torch.Tensor | None = None
    automatic: bool = False
    announced: bool = False

    def key(self, x_TD: torch.Tensor, salt: int, training: bool) -> DropoutKey | None:
        """How to draw the mask of the input x; None outside of training."""
        keys_T = self.keys_T
        if keys_T is None and self.automatic and training and self.p:
            keys_T = torch.randint(-(2**31), 2**31, x_TD.shape[:1], dtype=torch.int32, device=x_TD.device)
        if keys_T is None or self.p == 0:
            return None
        if keys_T.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"dropout has keys for {keys_T.shape[0]} rows, the input has {x_TD.shape[0]}: call set_rows"
            )
        return DropoutKey(keys_T, self.p, salt)


class LoRALinear(AdaptedLinear):
    """lora_A (R, in), lora_B (out, R): float32 whatever the base is stored in. ``salt`` keys this input's dropout."""

    suffixes: ClassVar[Mapping[str, str]] = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
    constant: tuple[torch.Tensor, torch.Tensor] | None = None  # a pair that is added too and never trained (PiSSA)

    def __init__(
        self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float, rows: DropoutRows, salt: int
    ) -> None:
        super().__init__(base)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scale, self.rows, self.salt = scale, rows, salt
        self.register_buffer("start_A", None, persistent=False)  # where A and B began, if not at an update of zero
        self.register_buffer("start_B", None, persistent=False)

    @torch.no_grad()
    def begin_at(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Start at an update of b a, from a pair (K, in), (out, K) in the first K <= R of the places; it is kept to
        measure change by.
        """
        self.lora_A[: len(a)].copy_(a)
        self.lora_B[:, : b.shape[1]].copy_(b / self.scale)
        self.keep_start(self.lora_A.detach().clone(), self.lora_B.detach().clone())

    def keep_start(self, start_A: torch.Tensor, start_B: torch.Tensor) -> None:
        """Say where A and B began."""
        self.start_A, self.start_B = start_A, start_B

    @staticmethod
    def project_together(x: torch.Tensor, linears: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """Outputs of linears that share the input x (..., in), adapted or not: one dropout mask, one product x A^T."""
        x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        outputs = project(x_TD, [one.base if isinstance(one, LoRALinear) else one for one in linears])
        adapted = [one for one in linears if isinstance(one, LoRALinear)]
        if x_TD.dtype != outputs[0].dtype:  # torch's autocast, in somebody's own loop
            x_TD = x_TD.to(outputs[0].dtype)
        # one pass for each adapter that is in the group: two adapters may drop differently
        for rows in {id(one.rows): one.rows for one in adapted}.values():
            group = [one if isinstance(one, LoRALinear) and one.rows is rows else None for one in linears]
            first = next(one for one in group if one is not None)
            outputs = lora_add(
                outputs, x_TD,
                [None if one is None else one.down() for one in group],
                [None if one is None else one.lora_B for one in group],
                [0.0 if one is None else one.scale for one in group],
                rows.key(x_TD, first.salt, first.training),
                [None if one is None else one.constant for one in group],
            )  # fmt: skip
        outputs = [one.finish(y) if isinstance(one, LoRALinear) else y for one, y in zip(linears, outputs, strict=True)]
        return tuple(outputs) if x.ndim == 2 else tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def learn_together(
        x_TD: torch.Tensor, outputs: Sequence[torch.Tensor], linears: Sequence[LoRALinear]
    ) -> tuple[torch.Tensor, ...]:
        """Outputs (T, out) that the merged weights of ``linears`` made of x, rounded or not: as they are, in the same
        memory, with the gradient that A and B have when W' = W + s B A makes them (straight-through). x gets none here.

        ConfigError for an adapter with dropout, which no merged weight can have.
        """
        if any(one.rows.p for one in linears):
            raise ConfigError(
                "dropout of the adapter's input cannot be where base and adapter are quantized as one weight",
                field="lora_dropout", expected="0",
            )  # fmt: skip
        learned = lora_learn(
            outputs,
            x_TD,
            [one.down() for one in linears],
            [one.up() for one in linears],
            [one.scale for one in linears],
        )
        return tuple(one.learn(y) for one, y in zip(linears, learned, strict=True))

    def up(self) -> torch.Tensor:
        """The B (out, R) of W' = W + s B A (`learn_together`), through which lora_B gets its gradient."""
        return self.lora_B

    def learn(self, y_TO: torch.Tensor) -> torch.Tensor:
        """y as it is; what a relative learns from it besides A and B (DoRA's magnitude)."""
        return y_TO

    def down(self) -> torch.Tensor | None:
        """What x is multiplied by (R, in): lora_A, or what a relative makes of it; None where nothing is added."""
        return self.lora_A

    def finish(self, z_TO: torch.Tensor) -> torch.Tensor:
        """What a relative of LoRA does to the sum of base and update (DoRA's magnitude)."""
        return z_TO

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) whose product over s is the whole update, outside of autograd."""
        return self.lora_A.detach(), self.lora_B.detach()

    def update_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `factors`, of the change since the start: their product is exactly zero where nothing has moved."""
        a, b = self.factors()
        if self.start_A is None or self.start_B is None:
            return a, b
        return torch.cat((a, a - self.start_A)), torch.cat((b - self.start_B, self.start_B), dim=1)

    def merged_weight(self) -> torch.Tensor:
        """W + s B A (out, in) in float32, outside of autograd."""
        with torch.no_grad():
            return torch.addmm(base_weight(self.base).float(), self.lora_B, self.lora_A, alpha=self.scale)

    def change(self) -> float:
        """Frobenius norm of what was added to s B A since the start, from products of width R; exactly 0 where nothing
        has moved.
        """
        a, b = (factor.double() for factor in self.update_factors())
        square = ((b.t() @ b) * (a @ a.t())).sum()
        return self.scale * float(square.clamp_min(0).sqrt())

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.rows.p:g}"


def initial_A(seed: int, name: str, rank: int, in_features: int) -> torch.Tensor:
    """(R, in) float32 for module `name`: kaiming_uniform with a = sqrt(5), that is U(-b, b) with b = 1 / sqrt(in)."""
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=seeded(seed, "lora_A", name))


def salt_of(name: str) -> int:
    """What tells the dropout of module ``name`` from the others'."""
    return int.from_bytes(hashlib.sha256(f"dropout\0{name}".encode()).digest()[:4], "little") >> 1
