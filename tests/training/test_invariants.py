"""What no method may depend on: how a batch is cut, packed, recomputed or taken up again. One class, run for every
method of the table; each check has a twin that must fail when the rule is broken.

A run is its trajectory: the loss of every step and all trained weights at the end. Two runs are one when no number of
them differs by more than `LARGEST` and the differences do not lean to one side by more than `MEAN` (a wrong divisor is
a small, one-sided difference). A resumed run is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.base import METHODS
from alpaca_lora.data.examples import Batch, StepBatch
from alpaca_lora.errors import NumericalError
from alpaca_lora.kernels.dropout import row_keys
from alpaca_lora.models.attention import Packed
from alpaca_lora.quantization.int4 import Int4
from alpaca_lora.quantization.int8 import Int8
from alpaca_lora.quantization.nf4 import NF4
from alpaca_lora.quantization.scheme import Scheme
from alpaca_lora.training.checkpoint import Checkpoint, CheckpointStore, verify
from alpaca_lora.training.micro_batch import shrink
from alpaca_lora.training.trainer import Trainer
from tests.tiny import tiny_model
from tests.training.tiny_run import digest, log_in, tiny_trainer

LARGEST, MEAN = 2e-5, 1e-6
STEPS = 4  # one more than an epoch has, and for AdaLoRA one before, two with and one after pruning


@dataclass(frozen=True)
class Case:
    """A run. Rounding to bfloat16 depends on how a batch is cut: such a run is only taken up again."""

    adapter: dict[str, Any]
    num_classes: int = 0
    dtype: torch.dtype = torch.float32
    scheme: Scheme | None = None  # trained for, quantization-aware

    def trainer(self, folder: Path | None = None, **more: Any) -> Trainer:
        model = tiny_model().to(self.dtype)
        settings = {"max_steps": STEPS, "validation": False, "num_classes": self.num_classes, "model": model, **more}
        settings["scheme"] = self.scheme
        return tiny_trainer(folder, adapter=self.adapter, **settings)


# what makes the tiny run of each method a real one
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "pissa": {},
    "adalora": {"adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 1},
    "ia3": {"lora_target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prefix": {"num_virtual_tokens": 5},
    "prompt": {"num_virtual_tokens": 5},
    "freeze": {"train_last_layers": 1},
    "bitfit": {},
    "full": {},
}
PROJECTED = {"method": "prefix", "num_virtual_tokens": 4, "prefix_projection": True}
CASES = {
    **{name: Case({"method": name, **SETTINGS[name]}) for name in METHODS},
    "rslora": Case({"use_rslora": True}),
    "lora+": Case({"lora_plus_ratio": 4.0}),
    "lora+ with dora": Case({"method": "dora", "lora_plus_ratio": 4.0}),
    "reparametrised prefix": Case(PROJECTED),
    "modules to save": Case({"modules_to_save": ["norm"]}),
    "patterns": Case({"rank_pattern": ["q_proj=2"], "alpha_pattern": ["v_proj=5"], "layers_to_transform": [1]}),
    "quantization-aware": Case({"lora_dropout": 0.0}, scheme=Int8()),
    "quantization-aware dora": Case({"method": "dora", "lora_dropout": 0.0}, scheme=Int4(group_size=16)),
    "quantization-aware adalora": Case({"method": "adalora", **SETTINGS["adalora"], "lora_dropout": 0.0}, scheme=NF4()),
    "quantization-aware full": Case({"method": "full"}, scheme=Int8()),
    "classes": Case({}, num_classes=3),
    "classes behind a prefix": Case({"method": "prefix", "num_virtual_tokens": 5}, num_classes=3),
}
ROUNDED = {
    f"{name} in bfloat16": Case({"method": name, **SETTINGS[name]}, dtype=torch.bfloat16)
    for name in ("lora", "freeze", "full")
}
# of these the checkpoint holds more than what is trained
WITH_STATE = {name: CASES[name] for name in ("adalora", "pissa", "prefix", "prompt", "reparametrised prefix")}


@dataclass
class Trajectory:
    """losses_S: of each step; weights: parameter -> its value at the end."""

    losses_S: torch.Tensor
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

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


def trained(case: Case, change: Callable[[Trainer], None] = lambda trainer: None, **more: Any) -> Trajectory:
    """A run whose trainer was changed before it began."""
    trainer = case.trainer(adam_epsilon=1e-3, learning_rate=5e-3, **more)
    change(trainer)
    trainer.train()
    return Trajectory.of(trainer)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def plain(case: Case) -> Trajectory:
    return trained(case)


def test_every_method_is_a_case() -> None:
    assert set(SETTINGS) == set(METHODS)


class TestInvariants:
    """One trajectory per method, however it is computed."""

    @pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
    def test_micro_batches(self, case: Case, plain: Trajectory, micro_batch_size: int) -> None:
        assert is_same(plain, trained(case, batches={"micro_batch_size": micro_batch_size}))

    def test_a_mean_of_means_would_be_noticed(self, case: Case, plain: Trajectory) -> None:
        def divide_by_its_own(trainer: Trainer) -> None:
            right = trainer.loss
            trainer.loss = lambda model, batch, num_supervised: right(model, batch, batch.num_supervised) / 2

        assert not is_same(plain, trained(case, divide_by_its_own))

    def test_packing(self, case: Case) -> None:
        """One stream of four segments, and four streams of one: in one call of the loss and one backward pass."""
        packed = trained(case, batches={"micro_batch_size": 4})
        assert is_same(packed, trained(case, one_by_one, batches={"micro_batch_size": 4}))

    def test_rows_that_see_each_other_would_be_noticed(
        self, case: Case, plain: Trajectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for room in ("loss", "classification"):
            monkeypatch.setattr(f"alpaca_lora.training.{room}.Packed", lambda lengths: Packed((sum(lengths),)))
        assert not is_same(plain, trained(case))
        # a stream of one segment has nobody to see
        alone = trained(case, one_by_one)
        monkeypatch.undo()
        assert is_same(plain, alone)

    @pytest.mark.parametrize("level", [True, "norms", "mlp", "disk"])
    def test_gradient_checkpointing(self, case: Case, plain: Trajectory, level: bool | str) -> None:
        assert is_same(plain, trained(case, gradient_checkpointing=level))

    def test_another_level_for_each_layer(self, case: Case, plain: Trajectory) -> None:
        def mixed(trainer: Trainer) -> None:
            trainer.model.gradient_checkpointing = ("layer", "mlp")

        assert is_same(plain, trained(case, mixed, gradient_checkpointing="auto"))

    def test_another_layer_in_the_recomputation_would_be_noticed(
        self, case: Case, plain: Trajectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second run of a checkpointed layer gives what the first gave, or the gradient is another one."""
        import alpaca_lora.models.recompute as recompute

        right = recompute.checkpoint

        def wrong(layer: Any, x_TD: torch.Tensor, *context: Any, **options: Any) -> Any:
            calls = []

            def drifting(x_TD: torch.Tensor, *context: Any) -> torch.Tensor:
                calls.append(1)
                return layer(x_TD * (1.0 if len(calls) == 1 else 1.2), *context)

            return right(drifting, x_TD, *context, **options)

        monkeypatch.setattr(recompute, "checkpoint", wrong)
        assert not is_same(plain, trained(case, gradient_checkpointing=True))
        assert not is_same(plain, trained(case, gradient_checkpointing="mlp"))


def one_by_one(trainer: Trainer) -> None:
    """Let the loss be the sum over streams of one segment each."""
    right = trainer.loss

    def loss(model: Any, batch: Batch, num_supervised: int) -> torch.Tensor:
        losses = []
        for one in shrink(StepBatch(0, 0, (batch,)), 1).micro_batches:
            if one.num_supervised:  # the last segment only rounds the stream up
                assert len(one.lengths) == 1
                keys_T = row_keys(trainer.options.seed, trainer.state.step, one.example_T, one.positions_T)
                trainer.adapter.set_rows(keys_T)
                losses.append(right(model, one, num_supervised))
        return torch.stack(losses).sum()

    trainer.loss = loss


# ---- taken up again


@dataclass
class Whole:
    """A run that was not interrupted, with a checkpoint of every step."""

    case: Case
    folder: Path
    trainer: Trainer

    def checkpoint(self, step: int) -> Checkpoint:
        return verify(CheckpointStore(self.folder).path(step))


@pytest.fixture(scope="module", params=CASES | ROUNDED, ids=str)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return run_whole((CASES | ROUNDED)[request.param], tmp_path_factory.mktemp("whole"))


def run_whole(case: Case, folder: Path) -> Whole:
    trainer = case.trainer(folder, save_steps=1, save_total_limit=9)
    trainer.train()
    return Whole(case, folder, trainer)


class TestResume:
    """A run that is taken up is the run that was not interrupted, from whichever step."""

    def test_at_every_step(self, whole: Whole, tmp_path: Path) -> None:
        log = log_in(whole.folder / "metrics.jsonl")
        for step in range(1, STEPS):
            folder = tmp_path / f"from-{step}"
            resumed = whole.case.trainer(folder, resume=whole.checkpoint(step), save_steps=1, save_total_limit=9)
            resumed.train()
            assert digest(resumed) == digest(whole.trainer), f"resumed at step {step}"
            assert log_in(folder / "metrics.jsonl") == log, f"resumed at step {step}"

    @pytest.mark.parametrize("lost", ["mean", "square"])
    def test_without_the_averages_would_be_noticed(self, whole: Whole, lost: str) -> None:
        resumed = whole.case.trainer(resume=whole.checkpoint(2))
        getattr(resumed.optimizer._averages, lost).mul_(0.5)
        resumed.train()
        assert digest(resumed) != digest(whole.trainer)

    @pytest.mark.parametrize("name", [name for name in ROUNDED if not name.startswith("lora")])
    def test_without_the_masters_would_be_noticed(self, name: str, tmp_path: Path) -> None:
        whole = run_whole(ROUNDED[name], tmp_path)
        resumed = whole.case.trainer(resume=whole.checkpoint(2))
        weights = resumed.optimizer._weights
        weights.copy_(weights.bfloat16())
        resumed.train()
        assert digest(resumed) != digest(whole.trainer)


def outcome(trainer: Trainer) -> Any:
    """All that a resumed run and the uninterrupted one have to agree in, what they say of themselves too."""
    try:
        trainer.train()
    except NumericalError as error:
        return str(error)
    adapter = trainer.adapter
    return digest(trainer), adapter.moved(), {k: t.tolist() for k, t in adapter.state_tensors().items()}


class TestOwnState:
    """What a method keeps besides its parameters comes out of the checkpoint, not out of attaching it again."""

    @pytest.fixture(params=WITH_STATE, ids=str)
    def whole(self, request: pytest.FixtureRequest, tmp_path: Path) -> Whole:
        return run_whole(WITH_STATE[request.param], tmp_path)

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_a_start_of_another_seed_and_text_is_of_no_consequence(self, whole: Whole, step: int) -> None:
        again = attached_elsewhere(whole.case)
        again.resume(whole.checkpoint(step))
        assert outcome(again) == outcome(whole.trainer)  # which is at its end

    def test_without_the_state_it_would_be_noticed(self, whole: Whole) -> None:
        again = attached_elsewhere(whole.case)
        again.adapter.load_extra_state = lambda tensors: {}
        again.resume(whole.checkpoint(2))
        assert outcome(again) != outcome(whole.trainer)


def attached_elsewhere(case: Case) -> Trainer:
    """As the machine that goes on with the run attaches it: the start is another one where it can be."""
    trainer = case.trainer(attach_seed=99, text="Another text. ")
    if case.adapter["method"] == "pissa":  # another library's decomposition
        for layer in trainer.adapter.layers.values():  # pyright: ignore
            layer.set_start(layer.start_A * 1.01, layer.start_B * 0.98)
    return trainer
