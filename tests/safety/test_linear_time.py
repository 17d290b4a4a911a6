"""A text ten times as long takes about ten times as long, however hostile it is.

What is quadratic takes a hundred times as long. The bound lies between both, far from each: a processor that others
share makes caches smaller and one try longer, and does not make a tenfold text thirty times as long.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from alpaca_lora.safety.policy import Policy

SMALL, LARGE, MOST = 100_000, 1_000_000, 30.0  # bytes, bytes, ratio


def _random_letters(size: int) -> str:
    return "".join(random.Random(0).choices("abc 1@.-", k=size))


HOSTILE: dict[str, Callable[[int], str]] = {
    "one letter": lambda size: "a" * size,
    "one digit": lambda size: "1" * size,
    "one sign": lambda size: "." * size,
    "one space": lambda size: " " * size,
    "one Chinese character": lambda size: "杀" * (size // 3),
    "bait for backtracking": lambda size: ("a" * 50 + "!") * (size // 51),
    "nearly a card": lambda size: "4 " * (size // 2),
    "nearly a mail": lambda size: "a." * (size // 2 - 1) + "a@",
    "mails that never end": lambda size: "a@a." * (size // 4),
    "nearly an instruction": lambda size: "ignore all previous " * (size // 20),
    "nearly a recipe": lambda size: "how to make a " * (size // 14),
    "nearly a key": lambda size: "eyJ-" * (size // 4),
    "nearly a private key": lambda size: "-----BEGIN PRIVATE KEY-----\n" * (size // 28),
    "a private key without an end": lambda size: "-----BEGIN PRIVATE KEY-----\n" + ("A" * 64 + "\n") * (size // 65),
    "base64": lambda size: "aWdub3JlIGFs" * (size // 12),
    "single letters": lambda size: "b o m " * (size // 6),
    "zero width": lambda size: "\u200b" * (size // 3),
    "zero width between letters": lambda size: "a\u200b" * (size // 4),
    "marks": lambda size: "a" + "\u0301" * (size // 2),
    "ligatures": lambda size: "ﷺ" * (size // 3),
    "many findings": lambda size: "a@b.io " * (size // 7),
    "at random": _random_letters,
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.bundled()


def seconds(policy: Policy, text: str) -> float:
    """Processor time of a check on both sides."""
    started = time.process_time()
    policy.check(text, "input")
    policy.check(text, "output")
    return time.process_time() - started


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_proportional_to_the_text(policy: Policy, name: str) -> None:
    small, large = HOSTILE[name](SMALL), HOSTILE[name](LARGE)
    assert len(large) > 9 * len(small)
    policy.check(small, "input")  # what is built on first use is not counted
    least = [min(seconds(policy, small) for _ in range(2)), seconds(policy, large)]
    for _ in range(2):  # what else runs on the machine only makes a try longer
        if least[1] / least[0] >= MOST:
            least[1] = min(least[1], seconds(policy, large))
    assert least[1] / least[0] < MOST


@pytest.mark.slow
def test_a_stream_in_small_pieces_is_proportional_too(policy: Policy) -> None:
    def streamed(text: str) -> float:
        rail, started = policy.stream("output"), time.process_time()
        for start in range(0, len(text), 4):
            rail.push(text[start : start + 4])
        rail.flush()
        return time.process_time() - started

    text = "The museum opens at ten, and mails to a@b.io are read. 今天天气很好。"
    assert streamed(text * 400) / streamed(text * 40) < MOST
