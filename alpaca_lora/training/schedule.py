"""The learning rate as a pure function of the optimizer step: nothing to save, nothing that a resume could restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warmup to ``peak`` over ``warmup_steps``, then down to zero at ``total_steps`` (``constant``: no fall).

    The first step already has peak / warmup_steps: a step with learning rate zero would be wasted.
    """

    kind: Literal["linear", "cosine", "constant"]
    peak: float
    total_steps: int
    warmup_steps: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of the ``step``-th update, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        # share of the fall that is done; the update after the last would be at 1
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        remaining = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * max(0.0, remaining)


def total_steps(num_epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: ``max_steps`` where given, else ``num_epochs`` rounded up to whole steps."""
    return max_steps if max_steps is not None else max(1, math.ceil(num_epochs * steps_per_epoch - 1e-9))


def warmup_steps(asked: int | None, total: int) -> int:
    """Warmup as asked, else 10 % of the steps and at most 100; never longer than the run."""
    return min(total, asked) if asked is not None else min(100, total // 10)
