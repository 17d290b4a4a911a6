"""A caller's share: a bucket that fills with time, a count that comes back to nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.server.errors import ApiError
from alpaca_lora.server.keys import Caller
from alpaca_lora.server.limits import KeyLimits

ALICE, BOB = Caller("alice"), Caller("bob")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_has_its_requests_and_no_more() -> None:
    clock = Clock()
    limits = KeyLimits(requests_per_minute=3, clock=clock)
    for _ in range(3):
        limits.enter(ALICE)
    with pytest.raises(ApiError) as caught:
        limits.enter(ALICE)
    assert caught.value.status == 429 and caught.value.headers["retry-after"] == "20"
    limits.enter(BOB)
    clock.now = 19.9
    with pytest.raises(ApiError) as caught:
        limits.enter(ALICE)
    assert caught.value.headers["retry-after"] == "1"
    clock.now = 20.1
    limits.enter(ALICE)
    clock.now = 1e6  # a long pause saves up one minute's share, not more
    for _ in range(3):
        limits.enter(ALICE)
    with pytest.raises(ApiError):
        limits.enter(ALICE)


def test_only_so_many_at_once() -> None:
    limits = KeyLimits(max_concurrency=2)
    slots = [limits.enter(ALICE) for _ in range(2)]
    with pytest.raises(ApiError) as caught:
        limits.enter(ALICE)
    assert caught.value.code == "concurrency_exceeded" and "retry-after" in caught.value.headers
    slots[0].release()
    slots[0].release()  # once is enough
    limits.enter(ALICE)
    with pytest.raises(ApiError):
        limits.enter(ALICE)


def test_zero_is_no_limit() -> None:
    limits = KeyLimits()
    for _ in range(10_000):
        limits.enter(ALICE)
    assert limits.running(ALICE) == 10_000 and limits.running(BOB) == 0


@given(st.lists(st.floats(0, 100), max_size=200), st.integers(1, 60))
def test_never_more_than_the_rate_and_one_minutes_share(pauses: list[float], rate: int) -> None:
    clock = Clock()
    limits = KeyLimits(requests_per_minute=rate, clock=clock)
    passed = 0
    for pause in pauses:
        clock.now += pause
        try:
            limits.enter(ALICE)
        except ApiError:
            continue
        passed += 1
    assert passed <= rate + clock.now * rate / 60 + 1e-6
