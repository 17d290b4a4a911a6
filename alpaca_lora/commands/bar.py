"""How far a command's work is that is done piece by piece, apart from training."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g}/s" if task.speed else "")


class Bar:
    """What is done of how much, its rate and the time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, what: str) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task(what, total=None)
        self._done, self._total, self._said = 0, 0, time.perf_counter()

    def __call__(self, done: int, total: int, what: str) -> None:
        if done <= self._done or total != self._total:  # another part of the work
            self.progress.reset(self.task, total=total)
        self._done, self._total = done, total
        self.progress.update(self.task, completed=done, description=what)
        if not self.console.is_terminal and time.perf_counter() - self._said > PLAIN_SECONDS:
            self._said = time.perf_counter()
            task = self.progress.tasks[0]
            rate = (task.elapsed or 0) / done
            text = f"{what}: {done}/{total}, {rate:.2g} s each, {rate * (total - done):.0f} s left"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
