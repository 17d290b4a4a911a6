from __future__ import annotations

import io

from rich.console import Console

from alpaca_lora.training.progress import TrainingProgress


def shown(*, terminal: bool, steps: int = 25) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    with TrainingProgress(console, total_steps=steps) as progress:
        for step in range(1, steps + 1):
            progress.step(
                step,
                loss=1.25,
                learning_rate=3e-4,
                tokens_per_second=1234.5,
                memory_bytes=3 << 30,
                seconds_per_step=2.0,
            )
        progress.say("a line [with brackets]")
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "step 1/25  loss 1.2500  lr 3.00e-04  1,234 tok/s  3.00 GiB  left 0:00:48"
    assert [line.split()[1] for line in lines[:-1]] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[-1] == "a line [with brackets]"


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "25/25" in text and "1,234 tok/s" in text and "loss 1.2500" in text


def test_nothing_without_a_console() -> None:
    with TrainingProgress(None, total_steps=1) as progress:
        progress.say("x")
        progress.step(1, loss=1, learning_rate=1, tokens_per_second=1, memory_bytes=1, seconds_per_step=1)
