"""Classifying adapters as judges of a policy's rules: asked from a worker, answered by the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from alpaca_lora.safety.classifier import Classifier as Judge
from alpaca_lora.server.classify_api import Classifier
from alpaca_lora.server.service import Service


class RailClassifiers(Mapping[str, Judge]):
    """Name of a classifying adapter -> the function that a policy calls. A policy is read before the service is there:
    `bind` it before the first text is checked.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._service: Service | None = None

    def bind(self, service: Service) -> None:
        self._service = service

    def __getitem__(self, name: str) -> Judge:
        if name not in self._names:
            raise KeyError(name)
        return lambda texts: self._judge(name, texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _judge(self, name: str, texts: Sequence[str]) -> list[dict[str, float]]:
        """Waits for the engine: never called on the event loop. A text of nothing but space has no label."""
        service = self._service
        assert service is not None
        asked = [text for text in texts if text.strip()]
        if not asked:
            return [{label: 0.0 for label in service.models.find(name).labels} for _ in texts]
        work = Classifier(service).classify(service.models.find(name), asked, "rail")
        found = iter(asyncio.run_coroutine_threadsafe(work, service.bridge.loop).result())
        labels = service.models.find(name).labels
        return [next(found).probabilities if text.strip() else dict.fromkeys(labels, 0.0) for text in texts]
