"""metrics.jsonl, one object per line, and its copies to TensorBoard and Weights & Biases; knows names and numbers only.

The log is part of a checkpoint: a resumed run's log equals the uninterrupted one's, apart from the `TIMING_KEYS`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alpaca_lora.errors import MachineError
from alpaca_lora.training.durable import replace_file

TIMING_KEYS = ("tokens_per_second", "memory_bytes", "seconds")


class Tracker(Protocol):
    """Somewhere else that wants the metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends records to ``path`` and hands their numbers to the trackers.

    Begins with ``lines`` (those of the checkpoint that is resumed) and nothing else. A full disk or a broken tracker
    does not end the training: lines wait in memory for the next write, a tracker that fails is told of once and left.
    """

    def __init__(
        self, path: Path | None, *, lines: Sequence[str] = (), trackers: Sequence[Tracker] = (),
        say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.path, self.lines, self._trackers, self._say = path, list(lines), list(trackers), say
        self._written = 0
        self._told = False
        if path is not None:
            replace_file(path, self.text().encode())
            self._written = len(self.lines)

    def write(self, record: Mapping[str, Any]) -> None:
        """One line; floats as their shortest exact text. ``record`` holds ``step``."""
        self.lines.append(json.dumps(record))
        if self.path is not None:
            self._append(self.path)
        values = {k: float(v) for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        for tracker in list(self._trackers):
            try:
                tracker.log(values, record["step"])
            except Exception as error:  # whatever a third party's client raises must not end the run
                self._say(f"{type(tracker).__name__} failed and is left out from here on: {error}")
                self._trackers.remove(tracker)

    def text(self) -> str:
        """The whole log."""
        return "".join(f"{line}\n" for line in self.lines)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def close(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:  # as in `write`: the adapter is still to be saved
                self._say(f"{type(tracker).__name__} could not be closed: {error}")

    def _append(self, path: Path) -> None:
        """Write what is not written yet. After a failure the whole file is written anew: its end may be half a line."""
        try:
            if self._told:
                replace_file(path, self.text().encode())
            else:
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in self.lines[self._written :]))
            self._written, self._told = len(self.lines), False
        except OSError as error:
            if not self._told:
                self._say(f"{path} cannot be written ({error.strerror}); the log waits in memory")
            self._told = True


class TensorBoard:
    """Event files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # optional
        except ImportError as error:
            raise MachineError(
                "tensorboard is not installed", field="report_to", fix="pip install 'alpaca-lora[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A wandb run of ``project``."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # optional
        except ImportError as error:
            raise MachineError(
                "wandb is not installed", field="report_to", fix="pip install 'alpaca-lora[wandb]'"
            ) from error
        self._run = wandb.init(project=project, name=name or None, config=dict(config), dir=str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def require_trackers(report_to: Iterable[str], wandb_project: str) -> None:
    """MachineError when a tracker that is asked for is not installed; before anything is moved or written."""
    for name in [*report_to, *(["wandb"] if wandb_project else [])]:
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"{name} is not installed", field="report_to", fix=f"pip install 'alpaca-lora[{name}]'")


def open_trackers(
    report_to: Iterable[str], *, folder: Path, wandb_project: str, wandb_run_name: str, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers asked for. MachineError with the command that installs what is missing."""
    wanted = list(dict.fromkeys([*report_to, *(["wandb"] if wandb_project else [])]))
    trackers: list[Tracker] = []
    for name in wanted:
        if name == "tensorboard":
            trackers.append(TensorBoard(folder / "tensorboard"))
        else:
            trackers.append(WeightsAndBiases(wandb_project or "alpaca-lora", wandb_run_name, config, folder))
    return trackers
