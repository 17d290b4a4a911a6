"""What no method may depend on: how a batch is cut, packed, recomputed or taken up again. One class, run for every
method of the table; each check has a twin that must fail when the rule is broken.

A run is its trajectory: the loss of every step and all trained weights at the end. Two runs are one when no number of
them differs by more than `LARGEST` and the differences do not lean to one side by more than `MEAN` (a wrong divisor is
a small, one-sided difference).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.base import METHODS
from alpaca_lora.models.attention import Packed
from alpaca_lora.training.checkpoint import CheckpointStore, verify
from alpaca_lora.training.trainer import Trainer
from tests.training.tiny_run import digest, log_in, tiny_trainer

LARGEST, MEAN = 2e-5, 1e-6
STEPS = 6
# what makes the tiny run of each method a real one: enough steps per phase, a rate at which it learns
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "pissa": {},
    "adalora": {"adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 2},
    "ia3": {"lora_target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
    "freeze": {"train_last_layers": 1},
    "bitfit": {},
    "full": {},
}
VARIANTS = {
    "rslora": {"method": "lora", "use_rslora": True}, "lora+": {"method": "lora", "lora_plus_ratio": 4.0},
    "reparametrised prefix": {"method": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
    "modules to save": {"method": "lora", "modules_to_save": ["norm"]},
}  # fmt: skip
CASES = {**{name: {"method": name, **SETTINGS[name]} for name in METHODS}, **VARIANTS}


@dataclass
class Trajectory:
    """losses_S: of each step; weights: parameter -> its value at the end."""

    losses_S: torch.Tensor
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, trainer: Trainer) -> Trajectory:
        losses = [record["train_loss"] for record in trainer.log.records() if "train_loss" in record]
        weights = {n: t.clone() for n, t in trainer.optimizer.state_tensors().items() if n.startswith("weight.")}
        return cls(torch.tensor(losses, dtype=torch.float64), weights)

    def difference(self, other: Trajectory) -> tuple[float, float]:
        """(largest, mean) difference over all numbers of both; infinite where their shapes differ."""
        pairs = [(self.losses_S, other.losses_S)]
        if self.weights.keys() != other.weights.keys():
            return float("inf"), float("inf")
        pairs += [(tensor, other.weights[name]) for name, tensor in self.weights.items()]
        if any(one.shape != two.shape for one, two in pairs):
            return float("inf"), float("inf")
        flat = torch.cat([(one.double() - two.double()).reshape(-1) for one, two in pairs])
        return float(flat.abs().max()), float(flat.mean().abs())


def is_same(one: Trajectory, other: Trajectory) -> bool:
    largest, mean = one.difference(other)
    return largest <= LARGEST and mean <= MEAN


def trained(case: dict[str, Any], **changes: Any) -> Trajectory:
    settings = {"max_steps": STEPS, "validation": False, "adam_epsilon": 1e-3, "learning_rate": 5e-3}
    trainer = tiny_trainer(adapter=case, **settings, **changes)
    trainer.train()
    return Trajectory.of(trainer)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def plain(case: dict[str, Any]) -> Trajectory:
    return trained(case)


def test_every_method_is_a_case() -> None:
    assert set(SETTINGS) == set(METHODS)


class TestInvariants:
    """One trajectory per method, however it is computed."""

    @pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
    def test_micro_batches(self, case: dict[str, Any], plain: Trajectory, micro_batch_size: int) -> None:
        assert is_same(plain, trained(case, batches={"micro_batch_size": micro_batch_size}))

    def test_a_mean_of_means_would_be_noticed(
        self, case: dict[str, Any], plain: Trajectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import tests.training.tiny_run as tiny_run

        right = tiny_run.causal_lm_loss
        monkeypatch.setattr(tiny_run, "causal_lm_loss", lambda m, b, n: right(m, b, b.num_supervised) / 2)
        assert not is_same(plain, trained(case))

    def test_packing(self, case: dict[str, Any], plain: Trajectory) -> None:
        """Each row in a stream of its own, and all rows of a step in one."""
        alone = trained(case, batches={"micro_batch_size": 1})
        packed = trained(case, batches={"micro_batch_size": 4})
        assert is_same(alone, packed) and is_same(plain, packed)

    def test_rows_that_see_each_other_would_be_noticed(
        self, case: dict[str, Any], plain: Trajectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import alpaca_lora.training.loss as loss

        monkeypatch.setattr(loss, "Packed", lambda lengths: Packed((sum(lengths),)))
        assert not is_same(plain, trained(case))

    def test_gradient_checkpointing(self, case: dict[str, Any], plain: Trajectory) -> None:
        assert is_same(plain, trained(case, gradient_checkpointing=True))

    def test_another_layer_in_the_recomputation_would_be_noticed(
        self, case: dict[str, Any], plain: Trajectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second run of a checkpointed layer gives what the first gave, or the gradient is another one."""
        import alpaca_lora.models.decoder as decoder

        right = decoder.checkpoint

        def wrong(layer: Any, x_TD: torch.Tensor, *context: Any, **options: Any) -> Any:
            calls = []

            def drifting(x_TD: torch.Tensor, *context: Any) -> torch.Tensor:
                calls.append(1)
                return layer(x_TD * (1.0 if len(calls) == 1 else 1.2), *context)

            return right(drifting, x_TD, *context, **options)

        monkeypatch.setattr(decoder, "checkpoint", wrong)
        assert not is_same(plain, trained(case, gradient_checkpointing=True))

    def test_resume_at_every_step(self, case: dict[str, Any], tmp_path: Path) -> None:
        whole = tiny_trainer(tmp_path / "whole", adapter=case, max_steps=STEPS, save_steps=1, save_total_limit=9)
        whole.train()
        log = log_in(tmp_path / "whole" / "metrics.jsonl")
        for step in range(1, STEPS):
            checkpoint = verify(CheckpointStore(tmp_path / "whole").path(step))
            folder = tmp_path / f"from-{step}"
            resumed = tiny_trainer(
                folder, adapter=case, resume=checkpoint, max_steps=STEPS, save_steps=1, save_total_limit=9
            )
            resumed.train()
            assert digest(resumed) == digest(whole), f"resumed at step {step}"
            assert log_in(folder / "metrics.jsonl") == log, f"resumed at step {step}"

    def test_a_resume_without_the_averages_would_be_noticed(self, case: dict[str, Any], tmp_path: Path) -> None:
        whole = tiny_trainer(tmp_path / "whole", adapter=case, max_steps=STEPS, save_steps=1, save_total_limit=9)
        whole.train()
        checkpoint = verify(CheckpointStore(tmp_path / "whole").path(2))
        resumed = tiny_trainer(tmp_path / "b", adapter=case, resume=checkpoint, max_steps=STEPS)
        resumed.optimizer._mean.zero_()
        resumed.train()
        assert digest(resumed) != digest(whole)
