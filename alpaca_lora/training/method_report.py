"""What a method did, said after each run: which parameters moved and by how much, what it was to reach and reached.

Looks at an adapter; knows no method by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from alpaca_lora.adapters.base import Adapter


@dataclass(frozen=True)
class MethodReport:
    """moved: module -> norm of its change; facts: what the method says of itself (name, value)."""

    method: str
    num_trained: int
    num_base: int
    moved: Mapping[str, float]
    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, adapter: Adapter, num_base: int) -> MethodReport:
        """Of an adapter that was trained on a base with ``num_base`` parameters."""
        num_trained = sum(parameter.numel() for _, parameter in adapter.trained_parameters())
        return cls(adapter.method, num_trained, num_base, adapter.moved(), tuple(adapter.facts()))

    def kinds(self) -> list[tuple[str, int, float, float, float]]:
        """(kind of module, how many, smallest, mean and largest norm of change), in the model's order."""
        groups: dict[str, list[float]] = {}
        for name, norm in self.moved.items():
            groups.setdefault(name.rpartition(".")[2], []).append(norm)
        return [(kind, len(n), min(n), sum(n) / len(n), max(n)) for kind, n in groups.items()]

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) for the report's page."""
        share = self.num_trained / max(1, self.num_base)
        return [
            ("method", self.method),
            ("trained parameters", f"{self.num_trained:,} ({share:.2%} of the base's)"),
            *self.facts,
        ]

    def headline(self) -> str:
        """For the terminal, above the table."""
        return f"{self.method}: " + "; ".join(f"{name} {value}" for name, value in self.lines()[1:])

    def table(self) -> Table:
        """The kinds of modules and how far they moved."""
        table = Table(box=None, pad_edge=False)
        table.add_column("module")
        for name in ("number", "least change", "mean", "most"):
            table.add_column(name, justify="right")
        for kind, count, *norms in self.kinds():
            table.add_row(kind, str(count), *(f"{norm:.4g}" for norm in norms))
        return table

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method, "trained_parameters": self.num_trained, **dict(self.facts),
            "moved": {kind: {"modules": count, "min": low, "mean": mean, "max": high}
                      for kind, count, low, mean, high in self.kinds()},
        }  # fmt: skip
