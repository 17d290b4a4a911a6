"""The bridge by itself: order, refusal, cancelling at every moment, counts that come back to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.errors import UserError
from alpaca_lora.inference.request import Completion, Event, Request, SamplingParams
from alpaca_lora.server.bridge import Bridge
from alpaca_lora.server.errors import ApiError, unavailable
from alpaca_lora.server.ticket import MAX_BUFFERED, Ticket
from tests.server.fake_engine import FakeEngine
from tests.tiny import ByteTokenizer

TOKENIZER = ByteTokenizer()


def request(length: int = 3, max_new_tokens: int = 40) -> Request:
    return Request(tuple(range(length)), SamplingParams(max_new_tokens=max_new_tokens, stop_ids=(257,)))


def bridged(work: Callable[[Bridge, FakeEngine], Awaitable[Any]], **options: Any) -> Any:
    """What ``work`` returns, on a loop with a bridge that is stopped afterwards with nothing left in it."""

    async def run() -> Any:
        engine = FakeEngine(TOKENIZER, **options)
        errors: list[BaseException] = []
        bridge = Bridge(engine, on_failure=errors.append)
        bridge.start()
        try:
            return await work(bridge, engine)
        finally:
            engine.gate.set()
            assert await bridge.stop(10)
            assert (bridge.num_open, bridge._owners, engine.has_work) == (0, {}, False)
            assert not bridge._tickets

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_answers_come_in_order_and_to_their_places() -> None:
    async def work(bridge: Bridge, engine: FakeEngine) -> list[str]:
        ticket = await bridge.submit([request(1), request(2), request(3)])
        texts = [""] * 3
        async for place, event in ticket:
            texts[place] += event.text
        return texts

    assert bridged(work) == [f"base heard {n} characters" for n in (1, 2, 3)]


def test_all_or_none_are_added() -> None:
    async def work(bridge: Bridge, engine: FakeEngine) -> None:
        with pytest.raises(UserError, match="too long"):
            await bridge.submit([request(), request(600)])
        assert bridge.num_open == 0 and engine.cancelled == [1]

    bridged(work)


def test_the_loop_runs_while_the_engine_computes() -> None:
    async def work(bridge: Bridge, engine: FakeEngine) -> None:
        engine.gate.clear()
        ticket = await bridge.submit([request()])
        await asyncio.to_thread(engine.is_computing.wait)
        for _ in range(100):
            await asyncio.sleep(0)
        ticket.close()
        assert bridge.num_open == 1  # its room is given back when the engine has given it up
        engine.gate.set()
        while bridge.num_open:
            await asyncio.sleep(0.001)

    bridged(work)


def test_cancelled_while_it_is_being_added() -> None:
    async def work(bridge: Bridge, engine: FakeEngine) -> None:
        engine.gate.clear()
        first = await bridge.submit([request()])
        await asyncio.to_thread(engine.is_computing.wait)
        second = asyncio.create_task(bridge.submit([request()]))  # waits behind the step
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        engine.gate.set()
        first.close()
        while bridge.num_open:
            await asyncio.sleep(0.001)
        assert len(engine.seen) == 1  # the second was not even begun

    bridged(work)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.booleans()), min_size=1, max_size=6))
def test_whenever_readers_leave_nothing_is_left(readers: list[tuple[int, int, bool]]) -> None:
    """Of each reader: its requests, the events that it reads, whether it goes on to the end."""

    async def read(bridge: Bridge, num_requests: int, num_events: int, to_the_end: bool) -> int:
        ticket = await bridge.submit([request(max_new_tokens=5)] * num_requests)
        done = 0
        async for _, event in ticket:
            done += event.completion is not None
            num_events -= 1
            if num_events <= 0 and not to_the_end:
                break
        ticket.close()
        return done if to_the_end else num_requests

    async def work(bridge: Bridge, engine: FakeEngine) -> None:
        found = await asyncio.gather(*(read(bridge, *reader) for reader in readers))
        assert found == [num_requests for num_requests, _, _ in readers]
        while bridge.num_open:
            await asyncio.sleep(0.001)

    bridged(work)


def test_an_abort_ends_what_is_open_with_the_error() -> None:
    async def work(bridge: Bridge, engine: FakeEngine) -> None:
        engine.gate.clear()
        ticket = await bridge.submit([request(), request()])
        bridge.abort(unavailable("closing", "shutting_down"))
        with pytest.raises(ApiError, match="closing"):
            async for _ in ticket:
                raise AssertionError("nothing had come")
        engine.gate.set()
        while bridge.num_open:
            await asyncio.sleep(0.001)

    bridged(work)


def test_a_stopped_bridge_refuses_what_waits() -> None:
    async def run() -> None:
        engine = FakeEngine(TOKENIZER)
        bridge = Bridge(engine, on_failure=lambda error: None)
        bridge.start()
        engine.gate.clear()
        await bridge.submit([request()])
        await asyncio.to_thread(engine.is_computing.wait)
        waiting = asyncio.create_task(bridge.submit([request()]))
        await asyncio.sleep(0.01)
        assert not await bridge.stop(0.05)  # the step has not ended
        engine.gate.set()
        with pytest.raises(ApiError):
            await waiting

    asyncio.run(asyncio.wait_for(run(), 20))


# ---- tickets


def test_a_buffer_that_nobody_empties_ends_in_an_error() -> None:
    async def run() -> None:
        cancelled: list[int] = []
        ticket = Ticket(2, lambda _, places: cancelled.extend(places))
        for _ in range(MAX_BUFFERED):
            ticket.put(0, Event(0, "x"))
        assert cancelled == []
        ticket.put(0, Event(0, "x"))
        assert sorted(cancelled) == [0, 1] and len(ticket._buffer) == 0
        ticket.put(1, Event(1, "x"))
        with pytest.raises(ApiError) as caught:
            async for _ in ticket:
                raise AssertionError("the rest is not told")
        assert caught.value.code == "slow_reader"

    asyncio.run(run())


def test_what_had_come_is_told_before_an_error() -> None:
    async def run() -> None:
        ticket = Ticket(1, lambda _, places: None)
        ticket.put(0, Event(0, "a"))
        ticket.fail(unavailable("x", "y"))
        told = []
        with pytest.raises(ApiError):
            async for _, event in ticket:
                told.append(event.text)
        assert told == ["a"]

    asyncio.run(run())


def test_a_completion_ends_its_place() -> None:
    async def run() -> list[str]:
        ticket = Ticket(1, lambda _, places: None)
        ticket.put(0, Event(0, "a", Completion("a", (1,), "stop", 1)))
        return [event.text async for _, event in ticket]

    assert asyncio.run(run()) == ["a"]
