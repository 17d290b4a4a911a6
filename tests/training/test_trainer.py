"""The loop's invariants: how a run is cut, stopped and resumed never changes what is trained."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from alpaca_lora.data.examples import Batch
from alpaca_lora.errors import MachineError, NumericalError, Stopped
from alpaca_lora.models.attention import Packed
from alpaca_lora.training.checkpoint import CheckpointStore, verify
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.signals import SignalFlag
from alpaca_lora.training.trainer import Trainer
from tests.training.tiny_run import TinyBatches, digest, gradient, log_in, log_of, table, tiny_trainer


@pytest.fixture(scope="module")
def whole() -> Trainer:
    """The uninterrupted run, finished."""
    trainer = tiny_trainer()
    trainer.train()
    return trainer


class TestInvariants:
    """One trajectory for every way to cut, recompute, stop and resume it."""

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_micro_batches_do_not_change_the_gradient(self, dropout: float) -> None:
        gradients = {}
        for size in (1, 2, 4, 8):
            trainer = tiny_trainer(
                adapter={"lora_dropout": dropout}, batches={"batch_size": 8, "micro_batch_size": size}
            )
            trainer.train_step()  # lora_B is zero before, and with it lora_A's gradient
            gradients[size] = gradient(trainer, step=0)
        largest = gradients[8].abs().max()
        assert largest > 1e-3
        for size in (1, 2, 4):
            difference = gradients[size] - gradients[8]
            assert difference.abs().max() <= 1e-6 * max(1.0, float(largest))
            assert abs(difference.mean()) <= 1e-8

    def test_the_mean_of_micro_batch_means_would_be_noticed(self) -> None:
        """Negative control: the divisor that everybody once used fails the test above."""

        def wrong(model: torch.nn.Module, batch: Batch, num_supervised: int) -> torch.Tensor:
            return causal_lm_loss(model, batch, batch.num_supervised) / (8 / len(batch.lengths))  # pyright: ignore

        whole = tiny_trainer(batches={"batch_size": 8, "micro_batch_size": 8})
        cut = tiny_trainer(batches={"batch_size": 8, "micro_batch_size": 1})
        whole.loss = cut.loss = wrong
        assert (gradient(whole) - gradient(cut)).abs().max() > 1e-4

    def test_the_last_partial_batch_is_divided_by_its_own_tokens(self) -> None:
        trainer = tiny_trainer(adapter={"lora_dropout": 0.0})
        batch = trainer.loader.step_batch(2)
        assert batch.num_examples == 2  # of 4: ten rows are not a multiple of the batch
        _, losses = trainer._accumulate(batch)
        rows = [table()[i] for micro_batch in batch.micro_batches for i in micro_batch.indices]
        total, count = 0.0, 0
        for row in rows:
            one = Batch.pack([row])
            with torch.no_grad():
                logits = trainer.model.logits(trainer.model(one.ids_T, one.positions_T, Packed(one.lengths)))
            logp = torch.log_softmax(logits.double(), -1)[one.label_rows_N, one.label_ids_N]
            total, count = total - float(logp.sum()), count + one.num_supervised
        assert math.fsum(losses) == pytest.approx(total / count, abs=1e-5)

    def test_gradient_checkpointing_does_not_change_it(self) -> None:
        plain, recomputed = tiny_trainer(), tiny_trainer(gradient_checkpointing=True)
        for _ in range(3):
            plain.train_step()
            recomputed.train_step()
        assert recomputed.model.gradient_checkpointing
        difference = plain.optimizer.weights() - recomputed.optimizer.weights()
        assert difference.abs().max() <= 1e-6

    def test_the_same_seed_is_the_same_run(self) -> None:
        first, second, other = tiny_trainer(), tiny_trainer(), tiny_trainer(seed=8)
        for trainer in (first, second, other):
            trainer.train()
        assert digest(first) == digest(second)
        assert log_of(first) == log_of(second)
        assert digest(first) != digest(other)

    @pytest.mark.parametrize("polls", [0, 1])
    @pytest.mark.parametrize("step", range(7))
    def test_resumed_is_uninterrupted(self, step: int, polls: int, whole: Trainer, tmp_path: Path) -> None:
        first = tiny_trainer(tmp_path / "cut")
        first.signals = StopAt(first, step, polls)
        with pytest.raises(Stopped):
            first.train()
        checkpoint = CheckpointStore(tmp_path / "cut").newest(print)
        # the sixth step has one micro-batch: its second poll is the evaluation after it
        assert checkpoint is not None and checkpoint.step == (6 if (step, polls) == (5, 1) else step)
        second = tiny_trainer(tmp_path / "cut", resume=checkpoint)
        second.train()
        assert digest(second) == digest(whole)
        assert log_in(tmp_path / "cut" / "metrics.jsonl") == log_of(whole)
        assert second.state.best_step == whole.state.best_step

    def test_a_finished_run_can_be_resumed(self, tmp_path: Path) -> None:
        whole = tiny_trainer(tmp_path)
        whole.train()
        before = (tmp_path / "metrics.jsonl").read_text()
        again = tiny_trainer(tmp_path, resume=CheckpointStore(tmp_path).newest(print))
        again.train()
        assert digest(again) == digest(whole)
        assert (tmp_path / "metrics.jsonl").read_text() == before

    @pytest.mark.parametrize("forgotten", ["exp_avg", "updates", "step"])
    def test_a_resume_that_forgets_would_be_noticed(self, forgotten: str, whole: Trainer, tmp_path: Path) -> None:
        """Negative control of the test above: leave out one part of the state."""
        first = tiny_trainer(tmp_path)
        first.signals = StopAt(first, 3)
        with pytest.raises(Stopped):
            first.train()
        second = tiny_trainer(resume=verify(tmp_path / "checkpoint-3"))
        if forgotten == "exp_avg":
            second.optimizer._averages.mean.zero_()
        elif forgotten == "updates":
            second.optimizer.updates = 0
        else:
            second.state.step = 2
        second.train()
        assert digest(second) != digest(whole)

    def test_evaluation_is_invariant_to_batches_and_changes_nothing(self) -> None:
        trainer = tiny_trainer()
        trainer.train_step()
        before = digest(trainer)
        losses = []
        for size in (1, 2, 3):
            trainer.val_loader = TinyBatches(table((9, 4, 14), seed=1), micro_batch_size=size)
            losses += [trainer.evaluate()[0], trainer.evaluate()[0]]
        assert losses[0] == losses[1]  # no dropout
        assert max(losses) - min(losses) < 1e-6
        assert digest(trainer) == before

    @pytest.mark.parametrize("forgotten", [False, True])
    def test_dropout_is_drawn_again_by_step(self, forgotten: bool) -> None:
        """The order of draws does not matter, the step does; with the step left out of the key, two steps would be
        equal.
        """
        trainer = tiny_trainer(adapter={"lora_dropout": 0.5}, max_steps=6)
        trainer.train_step()
        gradients = []
        for step in (1, 2, 1):
            batch = trainer.loader.step_batch(0)
            batch = dataclasses.replace(batch, step=0 if forgotten else step)
            trainer._accumulate(batch)
            gradients.append(trainer.optimizer._grads.clone())
        assert torch.equal(gradients[0], gradients[2])
        assert torch.equal(gradients[0], gradients[1]) == forgotten


class StopAt(SignalFlag):
    """As if SIGTERM came ``polls`` polls after ``step`` was completed: in the first micro-batch, the second, or an
    evaluation.
    """

    def __init__(self, trainer: Trainer, step: int, polls: int = 0) -> None:
        super().__init__()
        self.trainer, self.step, self.polls = trainer, step, polls

    def check(self) -> None:
        if self.trainer.state.step >= self.step:
            if self.polls == 0:
                self.received = signal.SIGTERM
            self.polls -= 1
        super().check()


class TestStopping:
    def test_a_signal_saves_the_last_completed_step(self, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path)
        trainer.signals = StopAt(trainer, 3, polls=1)
        with pytest.raises(Stopped) as stopped:
            trainer.train()
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        assert str(tmp_path / "checkpoint-3") in str(stopped.value)
        assert verify(tmp_path / "checkpoint-3").state()["state"]["step"] == 3

    def test_a_signal_in_the_first_step(self, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path)
        trainer.signals = StopAt(trainer, 0)
        with pytest.raises(Stopped):
            trainer.train()
        assert verify(tmp_path / "checkpoint-0").step == 0

    def test_a_real_signal_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        def child() -> None:
            with SignalFlag() as signals:
                never = {"max_steps": 10_000, "eval_steps": 10_000, "save_steps": 10_000}
                trainer = tiny_trainer(tmp_path, signals=signals, **never)
                try:
                    trainer.train()
                except Stopped as stopped:
                    os._exit(stopped.exit_code)

        pid = os.fork()
        if pid == 0:
            child()
            os._exit(1)
        log = tmp_path / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.01)
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
        checkpoint = CheckpointStore(tmp_path).newest(print)
        assert checkpoint is not None
        assert len(checkpoint.log_lines()) == checkpoint.step >= 3

    def test_early_stopping_keeps_the_best(self, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path, learning_rate=3.0, max_steps=40, eval_steps=1, early_stopping_patience=2)
        state = trainer.train()
        assert state.stopped_early and state.step < 40
        assert state.best_step == state.step - 2
        best = verify(tmp_path / f"checkpoint-{state.best_step}").tensors()
        for name, parameter in trainer.optimizer.named_parameters():
            assert torch.equal(parameter, best[f"weight.{name}"])
        assert trainer.evaluate()[0] == pytest.approx(state.best_val_loss, abs=1e-7)

    def test_without_validation_the_last_weights_stay(self, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path, validation=False)
        state = trainer.train()
        assert state.val_loss is None and state.best_step is None
        last = verify(tmp_path / "checkpoint-6").tensors()
        assert all(torch.equal(p, last[f"weight.{n}"]) for n, p in trainer.optimizer.named_parameters())

    def test_epochs_may_be_fractions(self) -> None:
        assert tiny_trainer(max_steps=None, num_epochs=0.5).total_steps == 2  # of three steps an epoch
        assert tiny_trainer(max_steps=None, num_epochs=2).total_steps == 6
        assert tiny_trainer(max_steps=5, num_epochs=10).total_steps == 5


class TestNotFinite:
    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_no_update_and_the_batch_is_written(self, where: str, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path)
        for _ in range(2):
            trainer.train_step()
        trainer._evaluate_and_save()
        before = digest(trainer)
        bad_rows = trainer.loader.step_batch(2).micro_batches[0].indices

        def poisoned(model, batch, num_supervised):
            loss = causal_lm_loss(model, batch, num_supervised)
            if batch.indices != bad_rows:
                return loss
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss * 1.0

        trainer.loss = poisoned
        with pytest.raises(NumericalError, match=r"checkpoint-2") as error:
            trainer.train()
        assert error.value.exit_code == 5
        assert digest(trainer) == before
        assert trainer.state.step == 2
        report = json.loads((tmp_path / "nonfinite-step-3.json").read_text())
        assert report["step"] == 3
        assert report["micro_batches"][0]["rows"] == list(bad_rows)
        assert report["micro_batches"][0]["ids"] == trainer.loader.step_batch(2).micro_batches[0].ids_T.tolist()
        assert report["nonfinite_gradients"]

    def test_a_validation_loss_that_is_not_finite(self) -> None:
        trainer = tiny_trainer()
        trainer.evaluate = lambda: (math.nan, {})  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(NumericalError, match="validation loss"):
            trainer.train()

    def test_a_parameter_that_no_gradient_reaches(self) -> None:
        trainer = tiny_trainer()
        plain = trainer.loss

        def detached(model, batch, num_supervised):
            lora_B = model.model.layers[1].self_attn.v_proj.lora_B
            model.model.layers[1].self_attn.v_proj.lora_B = torch.nn.Parameter(lora_B.detach().clone())
            return plain(model, batch, num_supervised)

        trainer.loss = detached
        with pytest.raises(
            NumericalError, match=r"1 of 8 trained parameters get no gradient: .*1.self_attn.v_proj.lora_B"
        ):
            trainer.train()

    def test_a_module_that_never_moved_is_named(self) -> None:
        trainer = tiny_trainer(validation=False)
        frozen = next(p for n, p in trainer.optimizer.named_parameters() if ".lora_B" in n)
        after_step = trainer.adapter.after_step

        def undo(step: int) -> None:
            after_step(step)
            frozen.data.zero_()

        trainer.adapter.after_step = undo
        with pytest.raises(NumericalError, match=r"1 modules did not move in 6 steps: model.layers.0.self_attn.q_proj"):
            trainer.train()


class TestOutOfMemory:
    @pytest.mark.parametrize("phase", ["forward", "backward"])
    def test_micro_batches_halve_and_the_gradient_stays(self, phase: str) -> None:
        whole = tiny_trainer(batches={"batch_size": 8, "micro_batch_size": 8}, adapter={"lora_dropout": 0.2})
        tight = tiny_trainer(batches={"batch_size": 8, "micro_batch_size": 8}, adapter={"lora_dropout": 0.2})
        tight.loss = _memory_for(40, phase)
        for trainer in (whole, tight):
            trainer.train_step()
        assert whole.state.max_tokens is None and tight.state.max_tokens is not None
        assert (gradient(whole) - gradient(tight)).abs().max() <= 1e-6
        assert whole.state.supervised_tokens == tight.state.supervised_tokens
        assert tight.evaluate()[0] == pytest.approx(whole.evaluate()[0], abs=1e-6)

    def test_a_single_row_that_does_not_fit(self) -> None:
        trainer = tiny_trainer(batches={"batch_size": 10, "micro_batch_size": 10})
        trainer.loss = _memory_for(25, "forward")
        with pytest.raises(MachineError, match="one row of 29 tokens") as error:
            trainer.train()
        assert error.value.exit_code == 4

    def test_other_runtime_errors_pass(self) -> None:
        trainer = tiny_trainer()

        def broken(*_: object) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

        trainer.loss = broken
        with pytest.raises(RuntimeError, match="shapes"):
            trainer.train()


def _memory_for(max_tokens: int, phase: str):
    """A loss on a machine that has room for so many tokens; what it computed before it failed stays in the gradient."""

    def loss(model, batch, num_supervised):
        too_large = sum(batch.lengths[: len(batch.indices)]) > max_tokens  # without what rounds the stream up
        if too_large and (phase == "forward" or not torch.is_grad_enabled()):
            _out_of_memory()
        value = causal_lm_loss(model, batch, num_supervised)
        if too_large:
            # the upper layer's gradients are accumulated by then
            lora_B = model.model.layers[0].self_attn.q_proj.lora_B
            handle = lora_B.register_post_accumulate_grad_hook(lambda _: (handle.remove(), _out_of_memory()))
        return value

    return loss


def _out_of_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate")
