"""AdaLoRA's allocator: how important each triplet (row of A, value of E, column of B) is, and which ones stay.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023), equations 7 to 12.
Importance averages, masks and ranks are PEFT's bit for bit, apart from what PEFT gets wrong:

* nothing to prune (PEFT asks for the 0th smallest score and fails): everything stays;
* a threshold of zero, that is triplets nothing is known of, all of them before a first gradient (PEFT prunes every one,
  whatever the budget): as many go as the budget asks, the last ones of each module first, so that ranks stay even;
* no gradient (PEFT fails): a gradient of zero.

Triplets that tie at a threshold above zero all go, as in PEFT. Knows tensors by the name of their module; changes no
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Triplets(NamedTuple):
    """The factors of one module's update B diag(E) A, or something of their shapes: A (R, in), B (out, R), E (R, 1)."""

    A: torch.Tensor
    B: torch.Tensor
    E: torch.Tensor


class Gradients(NamedTuple):
    """As `Triplets`; None where nothing was computed."""

    A: torch.Tensor | None
    B: torch.Tensor | None
    E: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class BudgetSchedule:
    """How many triplets of the whole model stay after each step (equation 12); steps are counted from 1.

    initial, target: sums of all ranks. Nothing is pruned up to step `warmup`; then the budget falls as a cubic until it
    is the target at step `final`, the last one that prunes. A pruning is due every `interval` steps and at `final`.
    """

    initial: int
    target: int
    warmup: int
    final: int
    interval: int

    def budget(self, step: int) -> int:
        """Triplets that may stay after `step`."""
        if step >= self.final:
            return self.target
        if step <= self.warmup:
            return self.initial
        left = 1 - (step - self.warmup) / (self.final - self.warmup)
        return int((self.initial - self.target) * left**3 + self.target)

    def prunes(self, step: int) -> bool:
        """Whether masks are made anew at `step`."""
        return step == self.final or (self.warmup < step < self.final and step % self.interval == 0)


class RankAllocator:
    """The running averages of one model, and the masks that follow from them.

    sensitivity, uncertainty: module -> averages in the shapes of its factors (I-bar and U-bar of the paper); empty
    before the first update and after the last.
    """

    def __init__(self, schedule: BudgetSchedule, *, beta1: float, beta2: float) -> None:
        self.schedule, self.beta1, self.beta2 = schedule, beta1, beta2
        self.sensitivity: dict[str, Triplets] = {}
        self.uncertainty: dict[str, Triplets] = {}

    def after_step(
        self, step: int, weights: Mapping[str, Triplets], gradients: Mapping[str, Gradients]
    ) -> dict[str, torch.Tensor] | None:
        """Take in the gradient of update `step` (from 1); module -> mask_R of what stays, or None if nothing is due.

        As in PEFT the weights are those after the update, and the gradient of the last pruning step does not count.
        """
        if step < self.schedule.final or not self.sensitivity:
            self._update(weights, gradients)
        if not self.schedule.prunes(step):
            return None
        masks = keep_best(self.scores(), self.schedule.budget(step))
        if step == self.schedule.final:
            self.sensitivity, self.uncertainty = {}, {}
        return masks

    def scores(self) -> dict[str, torch.Tensor]:
        """Module -> score_R: of E, plus the mean over the row of A, plus the mean over the column of B (equation 7).

        The score of an element is its sensitivity times its uncertainty (equation 11).
        """
        found = {}
        for name, sensitivity in self.sensitivity.items():
            a, b, e = (mean * spread for mean, spread in zip(sensitivity, self.uncertainty[name], strict=True))
            found[name] = e.view(-1) + (a.mean(dim=1) + b.mean(dim=0))
        return found

    @torch.no_grad()
    def _update(self, weights: Mapping[str, Triplets], gradients: Mapping[str, Gradients]) -> None:
        """Equations 8 to 10: the sensitivity |w g| of each element, smoothed, and how far it is from that, smoothed."""
        for name, factors in weights.items():
            if name not in self.sensitivity:
                self.sensitivity[name] = Triplets(*(torch.zeros_like(factor) for factor in factors))
                self.uncertainty[name] = Triplets(*(torch.zeros_like(factor) for factor in factors))
            averages = zip(factors, gradients[name], self.sensitivity[name], self.uncertainty[name], strict=True)
            for weight, gradient, sensitivity, uncertainty in averages:
                now = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs_()
                sensitivity.mul_(self.beta1).add_(now * (1 - self.beta1))
                uncertainty.mul_(self.beta2).add_(now.sub_(sensitivity).abs_().mul_(1 - self.beta2))


def keep_best(scores: Mapping[str, torch.Tensor], budget: int) -> dict[str, torch.Tensor]:
    """Module -> mask_R, True for the `budget` triplets of the highest score_R over all modules.

    Scores are at least 0. Fewer stay where several tie at a threshold above 0; never fewer for scores of 0.
    """
    all_scores = torch.cat(list(scores.values()))
    surplus = len(all_scores) - budget
    if surplus <= 0:
        return {name: torch.ones_like(score_R, dtype=torch.bool) for name, score_R in scores.items()}
    threshold = float(all_scores.kthvalue(surplus).values)
    if threshold > 0:
        return {name: score_R > threshold for name, score_R in scores.items()}
    unknown = [(i, name) for name, score_R in scores.items() for i in (score_R == 0).nonzero().view(-1).tolist()]
    unknown.sort(key=lambda triplet: triplet[0], reverse=True)  # stable: of equal positions the first modules' go first
    masks = {name: torch.ones_like(score_R, dtype=torch.bool) for name, score_R in scores.items()}
    for i, name in unknown[:surplus]:
        masks[name][i] = False
    return masks
