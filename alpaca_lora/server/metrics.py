"""Prometheus figures under the names that vLLM's dashboards read. Labels are bounded: models served, fixed reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from alpaca_lora.inference.request import Completion
from alpaca_lora.server.errors import ApiError

MAX_MODELS = 100  # names in labels; more are told together, as `other`
OTHER = "other"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class TokenCounts(Protocol):
    """What `tokens` reads; see `generation.Usage`."""

    prompt_tokens: int
    completion_tokens: int


class Metrics:
    """One registry of its own. ``stats`` gives the engine's figures, labelled ``base_name``, when they are read."""

    def __init__(self, base_name: str, stats: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(base_name, stats))
        self._names: set[str] = {base_name}
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        self._success = self._counter("request_success", "Answers that ended", "finished_reason")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token", _WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "Until its turn came", _FIRST)
        self._prefill = self._histogram("request_prefill_time_seconds", "From its turn to its first token", _FIRST)
        self._decode = self._histogram("request_decode_time_seconds", "From its first token to its last", _WHOLE)
        self._inference = self._histogram("request_inference_time_seconds", "From its turn to its last token", _WHOLE)
        self._prompt_size = self._histogram("request_prompt_tokens", "Tokens of one prompt", _TOKENS)
        self._answer_size = self._histogram("request_generation_tokens", "Tokens of one answer", _TOKENS)
        self._errors = Counter(
            "alpaca_lora:http_errors", "Answers that were errors", ["status", "code"], registry=self._registry
        )

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(self._label(model)).observe(seconds)

    def between_tokens(self, model: str, seconds: float, count: int) -> None:
        """``count`` tokens came together: each took its share of the time."""
        histogram = self._between.labels(self._label(model))
        for _ in range(count):
            histogram.observe(seconds)

    def finished(self, model: str, reason: str, seconds: float) -> None:
        """An answer ended ``seconds`` after it was asked for."""
        self._success.labels(self._label(model), reason).inc()
        self._whole.labels(self._label(model)).observe(seconds)

    def computed(self, model: str, done: Completion) -> None:
        """What an answer took of the engine; not told of one that a rail cut, which the engine never ended."""
        queue, prefill, decode = done.times
        for histogram, value in (
            (self._queue, queue), (self._prefill, prefill), (self._decode, decode), (self._inference, prefill + decode),
            (self._prompt_size, done.prompt_tokens), (self._answer_size, done.completion_tokens),
        ):  # fmt: skip
            histogram.labels(self._label(model)).observe(value)

    def tokens(self, model: str, counts: TokenCounts) -> None:
        self._prompt.labels(self._label(model)).inc(counts.prompt_tokens)
        self._generated.labels(self._label(model)).inc(counts.completion_tokens)

    def error(self, error: ApiError) -> None:
        self._errors.labels(str(error.status), error.code or "none").inc()

    def expose(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _label(self, model: str) -> str:
        if model not in self._names and len(self._names) >= MAX_MODELS:
            return OTHER
        self._names.add(model)
        return model

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)


class _EngineFigures(Collector):
    """What the engine counts itself, read when Prometheus asks."""

    def __init__(self, base_name: str, stats: Callable[[], Any]) -> None:
        self._base_name, self._stats = base_name, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = (
            ("num_requests_running", "Answers that are computed", stats.num_running),
            ("num_requests_waiting", "Answers that wait to be computed", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1", stats.cache_usage),
        )
        counters = (
            ("prefix_cache_queries", "Prompt tokens that were looked for in the cache", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens that were found in the cache", stats.cached_tokens),
            ("num_preemptions", "Answers that gave up their room for a while", stats.num_preemptions),
        )
        for kind, figures in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in figures:
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._base_name], value)
                yield family
