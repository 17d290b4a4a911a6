"""What an output folder holds when a run comes to it, and what is done about that: nothing restarts or is
overwritten silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from alpaca_lora.errors import ConfigError, MachineError, ModelFileError, UserError
from alpaca_lora.training.checkpoint import Checkpoint, CheckpointStore, verify
from alpaca_lora.training.durable import probe, remove_temporaries
from alpaca_lora.training.options import TrainingOptions

# all that a run writes here; nothing else in the folder is ever touched
OURS = (
    "checkpoint-*", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "alpaca_lora.json",
    "config.yml", "ledger.jsonl", "rejects.jsonl", "report.html", "nonfinite-step-*.json", "tensorboard",
)  # fmt: skip
PROBE_BYTES = 16 << 20


class RunFolder:
    """``output_dir`` of one run, whose lock the caller holds."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say

    def claim(self, options: TrainingOptions) -> Checkpoint | None:
        """Decide where the run begins: the checkpoint to resume, None for the first step. Early, before anything slow.

        UserError: the folder holds a run and neither ``resume_from_checkpoint`` nor ``fresh`` is set, or the checkpoint
        is not there. ModelFileError: it is damaged (``auto``: all are). MachineError: the folder cannot be written.
        """
        if options.fresh and options.resume_from_checkpoint is not None:
            raise ConfigError(
                "given together with resume_from_checkpoint", field="fresh", fix="keep one: go on or start anew"
            )
        try:
            probe(self.path, PROBE_BYTES)
            for name in remove_temporaries(self.path):
                self._say(f"removed {name}, left half written by a run that was killed")
        except OSError as error:
            raise MachineError(
                f"cannot be written: {error.strerror}", file=self.path, field="output_dir",
                fix=f"at least {PROBE_BYTES >> 20} MiB are needed here; make room or choose another folder",
            ) from error  # fmt: skip
        wanted = options.resume_from_checkpoint
        if wanted is None:
            if self._runs() and not options.fresh:
                raise UserError(
                    f"holds a run already ({', '.join(path.name for path in self._runs()[:3])})", file=self.path,
                    field="output_dir", fix="--resume_from_checkpoint auto goes on with it, --fresh starts anew",
                )  # fmt: skip
            return None
        checkpoint = self._newest(self.path) if wanted == "auto" else self._named(Path(wanted))
        if checkpoint is not None:
            self._say(f"resuming from {checkpoint.path} (step {checkpoint.step})")
        return checkpoint

    def set_aside(self) -> None:
        """Move what an earlier run left into ``previous-N``: the caller was told to start anew, and is ready to."""
        found = sorted(path for pattern in OURS for path in self.path.glob(pattern))
        if not self._runs():
            return
        number = 1
        while (target := self.path / f"previous-{number}").exists():
            number += 1
        target.mkdir()
        for path in found:
            os.rename(path, target / path.name)
        self._say(f"the earlier run is now in {target}")

    def _named(self, path: Path) -> Checkpoint | None:
        if not os.path.isdir(path):
            raise UserError(
                "is not a folder" if os.path.exists(path) else "no such folder",
                file=path,
                field="resume_from_checkpoint",
                expected="a checkpoint folder or auto",
            )
        if CheckpointStore(path).steps():  # an output folder and not one checkpoint of it
            path_of_run, checkpoint = path, self._newest(path)
        else:
            path_of_run, checkpoint = path.parent, _verified(path)
        if self._runs() and path_of_run.resolve() != self.path.resolve():
            raise UserError(
                "holds another run than the one to resume",
                file=self.path,
                field="output_dir",
                fix="choose another folder",
            )
        return checkpoint

    def _newest(self, path: Path) -> Checkpoint | None:
        checkpoint = CheckpointStore(path).newest(self._say)
        if checkpoint is None:
            if (path / "adapter_model.safetensors").exists():
                raise ModelFileError(
                    "holds a finished adapter and no checkpoint", file=path, field="resume_from_checkpoint",
                    fix="start anew with --fresh",
                )  # fmt: skip
            self._say(f"no checkpoint in {path} yet: starting at step 0")
        return checkpoint

    def _runs(self) -> list[Path]:
        """Signs of a run; a log without a line is that of one that never took a step."""
        signs = [*self.path.glob("checkpoint-*"), *self.path.glob("adapter_model.safetensors")]
        log = self.path / "metrics.jsonl"
        if log.exists() and log.stat().st_size:
            signs.append(log)
        return signs


def _verified(path: Path) -> Checkpoint:
    try:
        return verify(path)
    except ModelFileError as error:
        raise ModelFileError(
            f"damaged or no checkpoint: {error.what}", file=error.file, expected=error.expected,
            fix="give another checkpoint, or auto for the newest good one of output_dir",
        ) from error  # fmt: skip
