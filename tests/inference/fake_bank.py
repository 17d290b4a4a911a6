"""A bank of adapters for tests of the engine: each multiplies what the feed-forward adds to its own rows, may have
virtual tokens and a class head, and counts its users.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from alpaca_lora.errors import UserError
from alpaca_lora.models.decoder import CausalLM


@dataclass(eq=False)
class FakeAdapter:
    name: str
    gain: float
    prefix: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    score: Any = None
    digest: str = field(default="")

    def __post_init__(self) -> None:
        self.digest = self.digest or f"{self.name} {self.gain}"

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.score is None else tuple(map(str, range(len(self.score.weight))))

    @property
    def num_virtual(self) -> int:
        return 0 if self.prefix is None else len(self.prefix[0][0])


class FakeBank:
    """What the engine asks of an `AdapterBank`."""

    def __init__(self, model: CausalLM) -> None:
        self.adapters: dict[str, FakeAdapter] = {}
        self.users: Counter[FakeAdapter] = Counter()
        self.rows: Sequence[tuple[FakeAdapter | None, int]] = ()
        self._config = model.config
        for layer in model.layers:
            layer.mlp.down_proj.register_forward_hook(self._act)  # pyright: ignore

    def load(self, name: str, gain: float, *, num_virtual: int = 0, num_classes: int = 0, seed: int = 0) -> FakeAdapter:
        generator, config = torch.Generator().manual_seed(seed), self._config
        shape = (num_virtual, config.num_key_value_heads, config.head_dim)
        prefix = [
            (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for _ in range(config.num_layers)
        ]
        score = SimpleNamespace(weight=torch.randn(num_classes, config.hidden_size, generator=generator))
        self.adapters[name] = FakeAdapter(
            name, gain, prefix if num_virtual else None, score if num_classes else None, f"{name} {gain} {seed}"
        )
        return self.adapters[name]

    def get(self, name: str) -> FakeAdapter:
        if name not in self.adapters:
            raise UserError(f"there is no {name!r}", field="adapter")
        return self.adapters[name]

    def acquire(self, name: str) -> FakeAdapter:
        adapter = self.get(name)
        self.users[adapter] += 1
        return adapter

    def release(self, adapter: FakeAdapter) -> None:
        assert self.users[adapter] > 0
        self.users[adapter] -= 1

    def set_rows(self, rows: Sequence[tuple[FakeAdapter | None, int]]) -> None:
        assert len({adapter for adapter, _ in rows}) == len(rows), "an adapter's rows are not one run"
        self.rows = rows

    def select_rows(self, places: Sequence[int]) -> None:
        assert list(places) == sorted(places) and places[-1] < sum(count for _, count in self.rows)
        self.rows = ()  # nothing of this bank acts on the head

    @property
    def num_users(self) -> int:
        return sum(self.users.values())

    def _act(self, module: torch.nn.Module, args: Any, out_TD: torch.Tensor) -> torch.Tensor:
        assert sum(count for _, count in self.rows) == len(out_TD)
        gains = [1.0 if adapter is None else adapter.gain for adapter, count in self.rows for _ in range(count)]
        return out_TD * torch.tensor(gains)[:, None]
