"""What the serving benchmarks count: the times of tokens, and speeds and percentiles of them. Knows no model, no HTTP.

A run is some streams that were asked for at one moment: ``times`` has, of each stream, the seconds from that moment to
each of its tokens (or pieces of text, over HTTP), ``counts`` how many tokens each had.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Run = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of them lie, between two of them in proportion; NaN for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, rest = int(place), place % 1
    return ordered[low] if rest == 0 else ordered[low] * (1 - rest) + ordered[low + 1] * rest


def decode_speed(run: Run) -> float:
    """Tokens per second of all streams together once each of them has begun: prompts do not count, not even those that
    a server reads one after the other.
    """
    begun, last = max(times[0] for times in run["times"]), max(times[-1] for times in run["times"])
    tokens = sum(
        count * sum(second > begun for second in times) / len(times)
        for times, count in zip(run["times"], run["counts"], strict=True)
    )
    return tokens / (last - begun) if last > begun else math.nan


def whole_speed(run: Run) -> float:
    """Tokens per second of all streams together from the moment they were asked for."""
    return sum(run["counts"]) / max(times[-1] for times in run["times"])


def waits(runs: Sequence[Run]) -> dict[str, float]:
    """Milliseconds to the first token and between two of one stream: half and 95 % of them are below."""
    firsts = [1000 * times[0] for run in runs for times in run["times"]]
    gaps = [1000 * (b - a) for run in runs for times in run["times"] for a, b in pairwise(times)]
    named = {"first": firsts, "between": gaps}
    return {f"{name}_p{share}": percentile(v, share / 100) for name, v in named.items() for share in (50, 95)}


def streams(runs: Sequence[Run]) -> dict[str, float]:
    """Figures of runs of one kind: medians of the speeds, percentiles over all tokens."""
    speeds = {
        "decode": statistics.median(map(decode_speed, runs)), "whole": statistics.median(map(whole_speed, runs))
    }  # fmt: skip
    return {**speeds, **waits(runs)}


def prefill(runs: Sequence[Run], num_tokens: int) -> float:
    """Tokens per second of a prompt: until its first answered token is there."""
    return num_tokens / statistics.median(run["times"][0][0] for run in runs)


def health(milliseconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50": percentile(milliseconds, 0.5), "p99": percentile(milliseconds, 0.99),
        "max": max(milliseconds, default=math.nan), "probes": len(milliseconds),
    }  # fmt: skip


def first_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str | None:
    """Where two lists of answers part, in words; None where they are the same."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if list(a) != list(b):
            pairs = zip(a, b, strict=False)
            place = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
            return f"prompt {number}, token {place}"
    return None


def rounded(value: Any) -> Any:
    """The same with numbers as short as they are worth; what is no number is null, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if not math.isfinite(value) else round(value, 3 if abs(value) < 10 else 1)
    return value
