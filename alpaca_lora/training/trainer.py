"""The training loop, all of it. It knows steps, gradients and when to evaluate and save; model, batches and loss are
arguments.

    for each step:   micro-batches of the optimizer batch -> loss, backward     (signals are polled before each)
                     a loss or gradient that is not finite -> no update, the batch is written out, the run ends
                     clip, learning rate of the step, AdamW, the adapter's own after_step (which may shrink it)
                     a line of the log; an evaluation, a checkpoint where one is due

Randomness, rows and learning rate are pure functions of the step, so a checkpoint holds no generator and no position
but the step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from alpaca_lora.adapters.base import Adapter, Kept
from alpaca_lora.data.examples import Batch, StepBatch
from alpaca_lora.device import current_memory_bytes
from alpaca_lora.errors import MachineError, ModelFileError, NumericalError, Stopped
from alpaca_lora.kernels.dropout import row_keys
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.training.activation_levels import set_levels
from alpaca_lora.training.checkpoint import LOG, STATE, TENSORS, Checkpoint, Content, verify
from alpaca_lora.training.guards import FrozenCheck, check_acted, gradients_watched, not_finite
from alpaca_lora.training.identity import RunIdentity
from alpaca_lora.training.loss import Judge, Loss, LossOnly
from alpaca_lora.training.metrics import MetricsLog
from alpaca_lora.training.micro_batch import is_out_of_memory, on_device, rounded_up, shrink
from alpaca_lora.training.optimizer import FlatAdamW
from alpaca_lora.training.options import TrainingOptions
from alpaca_lora.training.progress import TrainingProgress
from alpaca_lora.training.saver import Saver
from alpaca_lora.training.schedule import Schedule, total_steps, warmup_steps
from alpaca_lora.training.signals import Interrupted, SignalFlag
from alpaca_lora.training.state import TrainState

EXTRA = "adapter."  # before the names of the adapter's own state in a checkpoint


class Batches(Protocol):
    """The part of `data.loader.Loader` that trains."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step_batch(self, step: int) -> StepBatch: ...


class EvalBatches(Protocol):
    """The part of `data.loader.Loader` that evaluates."""

    def eval_batches(self) -> Iterator[Batch]: ...


class Trainer:
    """Trains what `adapter` calls its parameters; one object is one run, or the rest of one that `resume` took up.

    ``saver`` and ``log`` None: nothing is written. The folder for what a failure leaves behind is the saver's.
    """

    def __init__(
        self, model: CausalLM, adapter: Adapter, loader: Batches, loss: Loss, options: TrainingOptions, *,
        val_loader: EvalBatches | None = None, judge: Judge | None = None, device: torch.device | None = None,
        identity: RunIdentity | None = None, saver: Saver | None = None, log: MetricsLog | None = None,
        progress: TrainingProgress | None = None, signals: SignalFlag | None = None,
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.loader, self.loss, self.options = model, adapter, loader, loss, options
        self.val_loader, self.judge = val_loader, judge or LossOnly(loss)
        self.device = device or torch.device("cpu")
        self.identity, self.saver = identity or RunIdentity(), saver
        self.log, self.signals = log or MetricsLog(None), signals or SignalFlag()
        self.total_steps = total_steps(options.num_epochs, options.max_steps, loader.steps_per_epoch)
        self.schedule = Schedule(
            options.lr_scheduler_type, options.learning_rate, self.total_steps,
            warmup_steps(options.warmup_steps, self.total_steps),
        )  # fmt: skip
        self.progress = progress or TrainingProgress(None, total_steps=self.total_steps)
        adapter.begin(self.total_steps)
        self.optimizer = FlatAdamW(
            adapter.trained_parameters(), beta1=options.adam_beta1, beta2=options.adam_beta2,
            epsilon=options.adam_epsilon, weight_decay=options.weight_decay, ratio=adapter.learning_rate_ratio,
            averages=options.optimizer_state, folder=saver and saver.store.folder,
        )  # fmt: skip
        self.state = TrainState()
        self._best_weights: torch.Tensor | None = None  # only of a best step that has no checkpoint here
        self._saved_step: int | None = None
        self._gradients_proven = False
        set_levels(model, options.gradient_checkpointing)
        if saver is not None:
            model.activation_file.folder = saver.store.folder

    # ---- the loop

    def train(self) -> TrainState:
        """From where the state stands to the last step; the model then has the best weights, or the last without
        validation.

        Raises Stopped after a signal, the last completed step saved; NumericalError; MachineError (disk, memory).
        """
        frozen = FrozenCheck(self.model)
        try:
            self._evaluate_and_save()  # what a signal cut off, in a resumed run
            while self.state.step < self.total_steps and not self.state.stopped_early:
                self.train_step()
                self._evaluate_and_save()
        except Interrupted as interrupted:
            raise self._stop(interrupted) from None
        finally:
            self.adapter.set_rows(None)  # whoever asks the model next is not training
        self._save_now()
        self._take_best_weights()
        check_acted(self.adapter, self.state.step, self.optimizer)
        frozen.check()
        return self.state

    def train_step(self) -> None:
        """One optimizer step on the whole optimizer batch, and its line in the log."""
        state, step, started = self.state, self.state.step, time.perf_counter()
        batch = self.loader.step_batch(step)
        batch, losses = self._accumulate(batch)
        loss, grad_norm = math.fsum(losses), self.optimizer.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise not_finite(
                batch, losses, grad_norm, self.optimizer, folder=self.saver and self.saver.store.folder,
                last_good=self._last_good(), say=self.progress.say,
            )  # fmt: skip
        learning_rate = self.schedule.learning_rate(step)
        self.optimizer.clip(grad_norm, self.options.max_grad_norm)
        self.optimizer.step(learning_rate)
        self._shrink(self.adapter.after_step(step))

        state.step += 1
        state.epoch = state.step / self.loader.steps_per_epoch
        state.examples += batch.num_examples
        state.tokens += batch.num_tokens
        state.supervised_tokens += batch.num_supervised
        state.loss_sum += loss * batch.num_supervised
        state.last_loss = loss
        state.seconds += (seconds := time.perf_counter() - started)
        self._log_step(loss, learning_rate, grad_norm, batch.num_tokens, seconds)

    def _accumulate(self, batch: StepBatch) -> tuple[StepBatch, list[float]]:
        """Gradient of the whole optimizer batch, and each micro-batch's share of the loss.

        When memory runs out the step begins anew with smaller micro-batches: nothing of the failed try stays in the
        gradient.
        """
        while True:
            if self.state.max_tokens is not None:
                batch = shrink(batch, self.state.max_tokens)
            self.optimizer.zero_grad()
            try:
                with nullcontext() if self._gradients_proven else gradients_watched(self.optimizer):
                    losses = [self._backward(micro_batch, batch) for micro_batch in batch.micro_batches]
                    if (penalty := self.adapter.penalty()) is not None:
                        penalty.backward()
                self._gradients_proven = True
                return batch, torch.stack(losses).tolist()
            except _OutOfMemory as error:
                self._allow_fewer_tokens(error.batch)

    def _backward(self, micro_batch: Batch, batch: StepBatch) -> torch.Tensor:
        self.signals.check()
        stream = on_device(rounded_up(micro_batch), self.device)
        self.adapter.set_rows(row_keys(self.options.seed, batch.step, stream.example_T, stream.positions_T))
        try:
            loss = self.loss(self.model, stream, batch.num_supervised)
            loss.backward()
            return loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # raised out here: the first error as its context would keep the activations alive
        raise _OutOfMemory(micro_batch)

    def _shrink(self, kept: Mapping[str, Kept]) -> None:
        """Take out for good what the adapter gave up. Weights from before are of another shape: the best step is sought
        anew.
        """
        if not kept:
            return
        self.optimizer.select(kept)
        self._forget_best()
        self.progress.say(f"step {self.state.step + 1}: ranks are final, {len(kept)} parameters are smaller now")

    def _forget_best(self) -> None:
        state = self.state
        state.best_step = state.best_val_loss = state.best_rank = None
        state.best_figures, state.evaluations_since_best = {}, 0
        self._best_weights = None

    # ---- evaluation

    def evaluate(self) -> tuple[float, dict[str, Any]]:
        """Mean loss per supervised token (or row) over the validation rows, in nats, and the judge's figures; the model
        is left as it was.
        """
        assert self.val_loader is not None
        total, count, measured = 0.0, 0, []
        self.adapter.set_rows(None)
        pending = self.val_loader.eval_batches()
        with torch.no_grad():
            for whole in pending:
                for loss_sum, found in self._evaluate_batch(whole):
                    total += loss_sum
                    measured.append(found)
                count += whole.num_supervised
        return total / max(1, count), self.judge.figures(measured)

    def _evaluate_batch(self, whole: Batch) -> list[tuple[float, Any]]:
        """What the judge measures on a micro-batch, cut up where memory does not suffice."""
        while True:
            cut = shrink(StepBatch(0, 0, (whole,)), self.state.max_tokens or whole.num_tokens)
            measured: list[tuple[float, Any]] = []
            try:
                for batch in cut.micro_batches:
                    self.signals.check()
                    measured.append(self.judge.measure(self.model, on_device(rounded_up(batch), self.device)))
                return measured
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._allow_fewer_tokens(batch)

    # ---- what is due after a step

    def _evaluate_and_save(self) -> None:
        state = self.state
        is_last = state.step == self.total_steps
        is_best = False
        evaluation_due = self.val_loader is not None and (is_last or state.step % self.options.eval_steps == 0)
        if evaluation_due and state.evaluated_step != state.step:
            is_best = self._evaluate_and_log()
        save_due = is_last or is_best or state.stopped_early or state.step % self.options.save_steps == 0
        if (
            state.step
            and self._saved_step != state.step
            and (save_due or (self.saver and self.saver.is_due(state.step)))
        ):
            self._save(is_best=is_best)

    def _evaluate_and_log(self) -> bool:
        """Whether this is the best so far."""
        state = self.state
        started = time.perf_counter()
        loss, figures = self.evaluate()
        if not math.isfinite(loss):
            raise NumericalError(f"step {state.step}: the validation loss is {loss}; {self._last_good()}")
        state.val_loss, state.val_figures, state.evaluated_step = loss, figures, state.step
        rank = self.judge.rank(loss, figures)
        is_best = state.best_rank is None or rank < state.best_rank
        if is_best:
            state.best_val_loss, state.best_figures, state.best_rank = loss, figures, rank
            state.best_step, state.evaluations_since_best = state.step, 0
        else:
            state.evaluations_since_best += 1
            patience = self.options.early_stopping_patience
            patient = not patience or state.evaluations_since_best < patience
            state.stopped_early = not patient and self.adapter.is_settled()
        self.log.write({
            "step": state.step, "epoch": state.epoch, "val_loss": loss, "best_val_loss": state.best_val_loss,
            **figures, "seconds": time.perf_counter() - started,
        })  # fmt: skip
        shown = "".join(f", {name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
        self.progress.say(f"step {state.step}: validation loss {loss:.4f}{shown}" + (" (best)" if is_best else ""))
        if state.stopped_early:
            self.progress.say(
                f"no better {self.judge.criterion} in {state.evaluations_since_best} evaluations: stopping early"
            )
        return is_best

    def _log_step(self, loss: float, learning_rate: float, grad_norm: float, num_tokens: int, seconds: float) -> None:
        state, memory = self.state, current_memory_bytes(self.device)
        self.log.write({
            "step": state.step, "epoch": state.epoch, "train_loss": loss, "learning_rate": learning_rate,
            "grad_norm": grad_norm, "tokens": state.tokens, "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": num_tokens / seconds, "memory_bytes": memory, "seconds": seconds,
            **self.adapter.log_record(),
        })  # fmt: skip
        self.progress.step(
            state.step, loss=loss, learning_rate=learning_rate, tokens_per_second=state.tokens_per_second,
            memory_bytes=memory, seconds_per_step=state.seconds / state.step,
        )  # fmt: skip

    # ---- saving and resuming

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take the run up where ``checkpoint`` left it. Call `identity.check` on its state first; the log is the
        caller's.
        """
        record, tensors = checkpoint.state(), checkpoint.tensors()
        extra = {name.removeprefix(EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(EXTRA)}
        if kept := self.adapter.load_extra_state(extra):
            self.optimizer.select(kept)
        self.optimizer.load_state(tensors, updates=record["updates"], file=str(checkpoint.path / TENSORS))
        self.state = TrainState.from_record(record["state"], file=checkpoint.path / STATE)
        patience = self.options.early_stopping_patience  # may have been raised since
        impatient = bool(patience) and self.state.evaluations_since_best >= patience
        self.state.stopped_early = impatient and self.adapter.is_settled()
        if self.saver is None or self.saver.store.path(checkpoint.step) == checkpoint.path:
            self._saved_step = checkpoint.step  # one in another folder is not saved here yet
        if (best := self.state.best_step) is None:
            return
        try:
            weights = self.optimizer.flat_weights(verify(checkpoint.path.with_name(f"checkpoint-{best}")).tensors())
        except ModelFileError as error:
            self.progress.say(
                f"the best checkpoint so far cannot be used ({error}); the best is sought anew from here on"
            )
            self._forget_best()
            return
        if self.saver is None or not self.saver.store.path(best).is_dir():
            self._best_weights = weights  # the checkpoint that is resumed lies in another folder

    def _files(self) -> dict[str, Content]:
        tensors = {name: tensor.cpu() for name, tensor in self.optimizer.state_tensors().items()}
        tensors |= {EXTRA + name: tensor.cpu().contiguous() for name, tensor in self.adapter.extra_state().items()}
        record: dict[str, Any] = {
            "state": self.state.to_record(), "updates": self.optimizer.updates, "run": self.identity.to_record()
        }  # fmt: skip
        return {
            TENSORS: tensors,
            STATE: json.dumps(record, indent=1).encode(),
            LOG: self.log.text().encode(),
        }

    def _save(self, *, is_best: bool = False) -> None:
        """A checkpoint now if the disk takes it; if not, the saver asks for it again at a later step."""
        saved = self.saver is not None and self.saver.try_save(self.state.step, self._files(), self._pinned())
        self.optimizer.release()
        if saved:
            self._saved_step = self.state.step
        if is_best:
            self._best_weights = None if saved else self.optimizer.weights()

    def _save_now(self) -> None:
        if self.saver is not None and self._saved_step != self.state.step:
            self.saver.must_save(self.state.step, self._files(), self._pinned())
            self._saved_step = self.state.step

    def _pinned(self) -> Sequence[int]:
        return [] if self.state.best_step is None else [self.state.best_step]

    def _stop(self, interrupted: Interrupted) -> Stopped:
        """Keep the last completed step; what was computed of the next one is given up."""
        self._save_now()
        what = f"stopped by {interrupted} after step {self.state.step}"
        if self.saver is not None:
            what += f"; go on with --resume_from_checkpoint {self.saver.store.path(self.state.step)}"
        return Stopped(interrupted.signal_number, what)

    def _take_best_weights(self) -> None:
        best = self.state.best_step
        if best is None or best == self.state.step:
            return
        weights = self._best_weights
        if weights is None:
            assert self.saver is not None
            try:
                weights = self.optimizer.flat_weights(verify(self.saver.store.path(best)).tensors())
            except ModelFileError as error:
                self.progress.say(
                    f"the best checkpoint cannot be used ({error}): the weights are those of the last step"
                )
                return
        self.optimizer.load_weights(weights)
        self.adapter.set_rows(None)  # what it computed from the last weights is of no use now
        self.progress.say(f"weights of the best step, {best} (validation loss {self.state.best_val_loss:.4f})")

    def _last_good(self) -> str:
        if self.saver is None or not (steps := self.saver.store.steps()):
            return "there is no checkpoint to go back to"
        return f"the last good checkpoint is {self.saver.store.path(steps[0])}"

    def _allow_fewer_tokens(self, batch: Batch) -> None:
        if len(batch.lengths) == 1:
            raise MachineError(
                f"not enough memory for one row of {batch.num_tokens} tokens (row {batch.indices[0]} of the table)",
                field="cutoff_len", fix="lower cutoff_len, or set gradient_checkpointing",
            )  # fmt: skip
        self.state.max_tokens = max(max(batch.lengths), batch.num_tokens // 2)
        self.progress.say(
            f"out of memory at {batch.num_tokens} tokens: micro-batches of at most {self.state.max_tokens} from here on"
        )


class _OutOfMemory(Exception):
    """Memory ran out on this micro-batch."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
