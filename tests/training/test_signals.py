from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from alpaca_lora.training.signals import SIGNALS, Interrupted, SignalFlag
from tests.training.tiny_run import in_child


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_seen_at_the_next_poll(number: signal.Signals) -> None:
    def child() -> None:
        with SignalFlag() as flag:
            flag.check()
            os.kill(os.getpid(), number)
            with pytest.raises(Interrupted, match=number.name):
                flag.check()

    assert in_child(child) == 0


def test_the_second_one_ends_the_process_at_once() -> None:
    def child() -> None:
        with SignalFlag():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    assert in_child(child) == 143


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with SignalFlag():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_is_left_alone() -> None:
    results: list[object] = []

    def work() -> None:
        with SignalFlag() as flag:
            flag.check()
            results.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [signal.getsignal(signal.SIGTERM)]
