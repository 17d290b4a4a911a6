"""A whole training run in a fraction of a second: the tiny model, any method, and a table made by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alpaca_lora.adapters.base import method_class
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.qat import fake_quantize
from alpaca_lora.quantization.scheme import Scheme
from alpaca_lora.training.checkpoint import Checkpoint, CheckpointStore
from alpaca_lora.training.classification import ClassificationLoss
from alpaca_lora.training.identity import RunIdentity
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.metrics import TIMING_KEYS, MetricsLog
from alpaca_lora.training.options import TrainingOptions
from alpaca_lora.training.saver import Saver
from alpaca_lora.training.signals import SignalFlag
from alpaca_lora.training.trainer import Trainer
from tests.tiny import tiny_model

LENGTHS = (3, 29, 7, 2, 17, 5, 11, 23, 13, 4)  # very unequal, and not a multiple of the batch


def table(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[TokenizedExample]:
    """Rows of random bytes; about a third of each is prompt, not supervised."""
    random = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        supervised_T = np.arange(length) >= max(1, length // 3)
        rows.append(TokenizedExample(random.integers(0, 256, length).astype(np.int32), supervised_T, index))
    return rows


class TinyBatches:
    """The part of the loader's interface that the trainer uses; the rows of a step are a pure function of (seed,
    step).
    """

    def __init__(
        self, rows: list[TokenizedExample], *, batch_size: int = 4, micro_batch_size: int = 2, seed: int = 0
    ) -> None:
        self.rows, self.batch_size, self.micro_batch_size, self.seed = rows, batch_size, micro_batch_size, seed
        self.steps_per_epoch = -(-len(rows) // batch_size)

    def step_batch(self, step: int) -> StepBatch:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        chosen = [self.rows[i] for i in order[position * self.batch_size :][: self.batch_size]]
        cuts = range(0, len(chosen), self.micro_batch_size)
        return StepBatch(step, epoch, tuple(Batch.pack(chosen[i : i + self.micro_batch_size]) for i in cuts))

    def eval_batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.micro_batch_size):
            yield Batch.pack(self.rows[start : start + self.micro_batch_size])


def labelled(rows: list[TokenizedExample], num_classes: int) -> list[TokenizedExample]:
    """The rows as texts to classify."""
    return [dataclasses.replace(row, label=row.index * 2 % num_classes) for row in rows]


def tiny_options(folder: Path | str = "unused", **overrides: Any) -> TrainingOptions:
    defaults = {"max_steps": 6, "learning_rate": 0.02, "eval_steps": 2, "save_steps": 2, "seed": 7}
    return TrainingOptions.model_validate({"output_dir": str(folder), **defaults, **overrides})


def tiny_trainer(
    folder: Path | None = None, *, resume: Checkpoint | None = None, validation: bool = True,
    adapter: dict[str, Any] | None = None, batches: dict[str, Any] | None = None, model: CausalLM | None = None,
    signals: SignalFlag | None = None, say: Any = lambda _: None, num_classes: int = 0,
    attach_seed: int | None = None, text: str = "", scheme: Scheme | None = None, **overrides: Any,
) -> Trainer:  # fmt: skip
    """A trainer over the tiny model; ``folder`` None writes nothing. ``adapter``: adapter options, the method among
    them; ``num_classes``: texts to classify; ``attach_seed``, ``text``: what the adapter starts from besides the run's
    seed and its own text; ``scheme``: what is trained for (quantization-aware); ``overrides`` are training options.
    """
    options = tiny_options(folder or "unused", **overrides)
    model, rows, loss = model or tiny_model(), table(), causal_lm_loss
    if num_classes:
        attach_score(model, num_classes, seed=options.seed)
        rows, loss = labelled(rows, num_classes), ClassificationLoss()
    adapter_options = AdapterOptions(**{"lora_r": 4, "lora_dropout": 0.1, **(adapter or {})})
    plan = None if scheme is None else Plan.uniform(model, scheme)
    method = method_class(adapter_options.method).attach(
        model, adapter_options, seed=options.seed if attach_seed is None else attach_seed,
        encode_text=lambda given: list((text + given).encode()) if given else [],
    )  # fmt: skip
    if plan is not None:
        fake_quantize(model, plan)
    saver = log = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        saver = Saver(
            CheckpointStore(folder, keep=options.save_total_limit),
            write_adapter=lambda where: save_adapter(where, method, allow_untrained=True) and None,
            say=say, retry_seconds=0,
        )  # fmt: skip
        log = MetricsLog(folder / "metrics.jsonl", lines=resume.log_lines() if resume else (), say=say)
    trainer = Trainer(
        model, method, TinyBatches(rows, **{"seed": options.seed, **(batches or {})}), loss, options,
        val_loader=TinyBatches(table((9, 4, 14), seed=1)) if validation else None,
        identity=RunIdentity(config={"seed": options.seed}), saver=saver, log=log, signals=signals,
    )  # fmt: skip
    if resume is not None:
        trainer.resume(resume)
    return trainer


def digest(trainer: Trainer) -> str:
    """Of all that must be equal, bit for bit, in two runs that should be one: weights and the optimizer's averages."""
    sha = hashlib.sha256()
    for name, tensor in sorted(trainer.optimizer.state_tensors().items()):
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    """The log without what the clock decides."""
    return [{k: v for k, v in record.items() if k not in TIMING_KEYS} for record in trainer.log.records()]


def log_in(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING_KEYS} for record in records]


def gradient(trainer: Trainer, step: int = 0) -> torch.Tensor:
    """The gradient of a step, before clipping."""
    trainer._accumulate(trainer.loader.step_batch(step))
    return trainer.optimizer._grads.clone()


def in_child(function: Any) -> int:
    """Run ``function`` in a forked process and return how it ended: the exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
