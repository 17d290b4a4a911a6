"""What a person sees while it trains: a bar on a terminal, a plain line every few steps elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY = 10


class TrainingProgress:
    """A context around the loop. ``console`` None shows nothing."""

    def __init__(self, console: Console | None, *, total_steps: int, step: int = 0) -> None:
        self.console, self.total_steps = console, total_steps
        self._started_at = step
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=console, transient=False,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total_steps, completed=step, figures="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(
        self, step: int, *, loss: float, learning_rate: float, tokens_per_second: float, memory_bytes: int,
        seconds_per_step: float
    ) -> None:  # fmt: skip
        """One optimizer step is done; ``memory_bytes`` in use now."""
        figures = (
            f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tok/s  {memory_bytes / 2**30:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step == self._started_at + 1 or step % PLAIN_EVERY == 0 or step == self.total_steps:
            left = _duration((self.total_steps - step) * seconds_per_step)
            self.say(f"step {step}/{self.total_steps}  {figures}  left {left}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
