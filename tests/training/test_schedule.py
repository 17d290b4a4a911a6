from __future__ import annotations

import math

import pytest

from alpaca_lora.training.schedule import Schedule, total_steps, warmup_steps


def trace(kind, total: int, warmup: int) -> list[float]:
    schedule = Schedule(kind, 1.0, total, warmup)
    return [schedule.learning_rate(step) for step in range(total)]


def test_warmup_rises_to_the_peak_without_a_wasted_step() -> None:
    assert trace("linear", 100, 4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_linear_falls_to_just_above_zero() -> None:
    rates = trace("linear", 12, 2)
    assert rates[2:] == pytest.approx([1 - i / 10 for i in range(10)])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    rates = trace("cosine", 22, 2)
    assert rates[2] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert rates[21] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_constant_stays() -> None:
    assert trace("constant", 5, 1) == [1.0] * 5


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_never_zero_and_never_above_the_peak(kind, warmup: int) -> None:
    assert all(0 < rate <= 1 for rate in trace(kind, 7, warmup))


def test_total_steps() -> None:
    assert total_steps(3, None, 10) == 30
    assert total_steps(0.25, None, 10) == 3
    assert total_steps(0.001, None, 10) == 1
    assert total_steps(0.1, None, 10) == 1  # and not 2 because 0.1 * 10 is above 1 in binary
    assert total_steps(3, 7, 10) == 7
    assert total_steps(1, 70, 10) == 70


def test_warmup_steps() -> None:
    assert warmup_steps(None, 50) == 5
    assert warmup_steps(None, 5000) == 100
    assert warmup_steps(30, 20) == 20
    assert warmup_steps(0, 20) == 0
