"""The allocator beside PEFT's on the same weights and gradients, step by step, and where PEFT's fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.adapters.rank_allocator import BudgetSchedule, Gradients, RankAllocator, Triplets, keep_best

MODULES = {"0": (5, 7), "1": (7, 6), "2": (7, 6), "3": (6, 3)}  # "2" has the shapes of "1", so that it can tie with it
INITIAL, TARGET = 6, 3


def peft_model(*, total: int, tinit: int, tfinal: int, delta: int, beta1: float = 0.85, beta2: float = 0.7) -> Any:
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*shape) for shape in MODULES.values()))
    config = AdaLoraConfig(
        init_r=INITIAL, target_r=TARGET, tinit=tinit, tfinal=tfinal, deltaT=delta, beta1=beta1, beta2=beta2,
        total_step=total, target_modules=list(MODULES),
    )  # fmt: skip
    return get_peft_model(net, config).base_model


def peft_factors(model: Any, *, gradients: bool = False) -> dict[str, Any]:
    """Clones of all factors (or of their gradients) by module."""
    own = dict(model.model.named_parameters())
    kind = Gradients if gradients else Triplets

    def of(name: str, factor: str) -> torch.Tensor:
        parameter = own[f"{name}.lora_{factor}.default"]
        return (parameter.grad if gradients else parameter).detach().clone()

    return {name: kind(*(of(name, factor) for factor in "ABE")) for name in MODULES}


def train_peft(model: Any, generator: torch.Generator, *, tie: bool) -> None:
    """New weights and gradients, as an optimizer's step would leave them; `tie`: modules 1 and 2 are the same."""
    own = dict(model.model.named_parameters())
    for name, parameter in own.items():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if tie and name.startswith("2."):
                twin = own["1." + name.removeprefix("2.")]
                parameter.data.copy_(twin.data)
                parameter.grad = None if twin.grad is None else twin.grad.clone()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("total", "tinit", "tfinal", "delta"), [(20, 3, 5, 1), (23, 0, 4, 3), (12, 1, 0, 5), (9, 7, 1, 1), (4, 0, 1, 2)]
)
def test_masks_and_averages_are_peft_s_at_every_step(
    total: int, tinit: int, tfinal: int, delta: int, tie: bool
) -> None:
    generator = torch.Generator().manual_seed(total)
    model = peft_model(total=total, tinit=tinit, tfinal=tfinal, delta=delta)
    schedule = BudgetSchedule(INITIAL * len(MODULES), TARGET * len(MODULES), tinit, total - tfinal, delta)
    allocator = RankAllocator(schedule, beta1=0.85, beta2=0.7)
    masks: dict[str, torch.Tensor] | None = None
    prunings = overpruned = 0
    for step in range(1, total + 1):
        train_peft(model, generator, tie=tie)
        weights, gradients = peft_factors(model), peft_factors(model, gradients=True)
        assert model.rankallocator.budget_schedule(step)[0] == schedule.budget(step)
        model.update_and_allocate(step)
        if step <= schedule.final:
            new = allocator.after_step(step, weights, gradients)
            masks = new or masks
            prunings += new is not None
        if now := schedule.prunes(step):
            overpruned += sum(int(m.sum()) for m in (masks or {}).values()) < schedule.budget(step)
        theirs = model.rankallocator
        assert (len(theirs.exp_avg_ipt) == 0) == (not allocator.sensitivity)
        for name, averages in allocator.sensitivity.items():
            for factor, ours, spread in zip("ABE", averages, allocator.uncertainty[name], strict=True):
                assert torch.equal(ours, theirs.exp_avg_ipt[f"{name}.lora_{factor}.default"])
                assert torch.equal(spread, theirs.exp_avg_unc[f"{name}.lora_{factor}.default"])
        pattern = model.peft_config["default"].rank_pattern
        assert (pattern is None) == (masks is None)
        for name, mask in (masks or {}).items():
            assert mask.tolist() == pattern[f"{name}.lora_E.default"]
            if now or step > schedule.final:  # what was pruned is zero in PEFT
                kept = peft_factors(model)[name].E.view(-1) != 0
                assert not bool((kept & ~mask).any()) and bool(kept[mask].all())
    assert prunings == sum(schedule.prunes(step) for step in range(1, total + 1)) > 0
    assert overpruned == 0 if not tie else overpruned > 0 or prunings <= 3  # the twins do tie, and nothing else does
    assert masks is not None and 0 < sum(int(m.sum()) for m in masks.values()) <= schedule.target


def test_the_comparison_notices_a_difference() -> None:
    """Negative control: another beta2 gives other averages and in the end other masks."""
    generator = torch.Generator().manual_seed(0)
    model = peft_model(total=20, tinit=2, tfinal=2, delta=1)
    schedule = BudgetSchedule(INITIAL * len(MODULES), TARGET * len(MODULES), 2, 18, 1)
    same, other = (RankAllocator(schedule, beta1=0.85, beta2=beta2) for beta2 in (0.7, 0.1))
    differs = 0
    for step in range(1, 19):
        train_peft(model, generator, tie=False)
        weights, gradients = peft_factors(model), peft_factors(model, gradients=True)
        one, two = same.after_step(step, weights, gradients), other.after_step(step, weights, gradients)
        differs += one is not None and two is not None and any(not torch.equal(one[n], two[n]) for n in one)
    assert differs > 3


def test_the_budget_falls_as_a_cubic_from_all_to_the_target() -> None:
    schedule = BudgetSchedule(initial=48, target=32, warmup=4, final=14, interval=3)
    budgets = [schedule.budget(step) for step in range(1, 21)]
    assert budgets[:4] == [48] * 4 and budgets[13:] == [32] * 7
    assert budgets == sorted(budgets, reverse=True)
    assert schedule.budget(9) == int(16 * 0.5**3 + 32)
    assert [step for step in range(1, 21) if schedule.prunes(step)] == [6, 9, 12, 14]


def test_nothing_to_prune_keeps_everything() -> None:
    """PEFT asks for the 0th smallest score."""
    scores = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0])}
    with pytest.raises((RuntimeError, IndexError)):
        torch.cat(list(scores.values())).kthvalue(0)
    for budget in (3, 4):
        assert {name: mask.tolist() for name, mask in keep_best(scores, budget).items()} == {
            "a": [True, True], "b": [True]
        }  # fmt: skip


def test_scores_of_zero_are_pruned_only_as_far_as_the_budget_asks() -> None:
    """PEFT prunes all of them: at a first step without any gradient that is every triplet of the model."""
    nothing = {name: torch.zeros(6) for name in "abcd"}
    assert {mask.sum().item() for mask in keep_best(nothing, 12).values()} == {3}  # even
    assert keep_best(nothing, 12)["a"].tolist() == [True] * 3 + [False] * 3
    masks = keep_best(nothing, 13)
    assert sum(int(mask.sum()) for mask in masks.values()) == 13
    some = {"a": torch.tensor([0.0, 3.0, 0.0]), "b": torch.tensor([1.0, 0.0, 2.0])}
    masks = keep_best(some, 4)
    assert masks["a"].tolist() == [True, True, False] and masks["b"].tolist() == [True, False, True]
    assert keep_best(some, 2)["a"].tolist() == [False, True, False]  # a threshold above zero


def test_ties_above_zero_go_together() -> None:
    masks = keep_best({"a": torch.tensor([1.0, 1.0, 2.0]), "b": torch.tensor([1.0, 3.0])}, 4)
    assert masks["a"].tolist() == [False, False, True] and masks["b"].tolist() == [False, True]


def test_no_gradient_counts_as_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": Triplets(*(torch.randn(s, generator=generator) for s in ((3, 4), (5, 3), (3, 1))))}
    none, zero = (RankAllocator(BudgetSchedule(3, 1, 1, 3, 1), beta1=0.8, beta2=0.6) for _ in range(2))
    known = Gradients(*(torch.ones_like(weight) for weight in weights["a"]))
    zeros = Gradients(*(torch.zeros_like(weight) for weight in weights["a"]))
    for gradients in ((known, known), (known._replace(B=None), known._replace(B=zeros.B))):
        none.after_step(1, weights, {"a": gradients[0]})
        zero.after_step(1, weights, {"a": gradients[1]})
    for ours, theirs in zip(none.sensitivity["a"], zero.sensitivity["a"], strict=True):
        assert torch.equal(ours, theirs) and bool(ours.any())
    before = none.sensitivity["a"].B.clone()
    none.after_step(1, weights, {"a": Gradients(None, None, None)})
    torch.testing.assert_close(none.sensitivity["a"].B, before * 0.8)  # it is forgotten, not kept


def test_a_schedule_of_one_step_prunes_by_its_own_gradient() -> None:
    """PEFT looks up averages that were never made."""
    weights = {"a": Triplets(torch.ones(2, 3), torch.ones(4, 2), torch.tensor([[1.0], [2.0]]))}
    gradients = {"a": Gradients(torch.ones(2, 3), torch.ones(4, 2), torch.ones(2, 1))}
    masks = RankAllocator(BudgetSchedule(2, 1, 0, 1, 1), beta1=0.5, beta2=0.5).after_step(1, weights, gradients)
    assert masks is not None and masks["a"].tolist() == [False, True]
