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
    """num_started: parameters that were trained at first; num_trained: those that were left in the end (AdaLoRA shrinks
    its own); num_base: the base model's alone. moved: module -> norm of its change; norms: (module, part) -> norm of
    that part (lora_A, lora_B, a magnitude) before the first step and at the end, None for a start that nobody noted.
    facts: what the method says of itself (name, value).
    """

    method: str
    num_started: int
    num_trained: int
    num_base: int
    moved: Mapping[str, float]
    norms: Mapping[tuple[str, str], tuple[float | None, float]]
    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, adapter: Adapter, num_base: int) -> MethodReport:
        """Of an adapter after its run, on a base that had ``num_base`` parameters without it."""
        num_trained = sum(parameter.numel() for _, parameter in adapter.trained_parameters())
        started = {} if adapter.movement is None else adapter.movement.norms
        norms = {
            (module, part): (started.get((module, part)), float(parameter.detach().double().norm()))
            for module, part, parameter in adapter.parts()
        }
        return cls(
            adapter.method, adapter.num_trained or num_trained, num_trained, num_base, adapter.moved(), norms,
            tuple(adapter.facts()),
        )  # fmt: skip

    def kinds(self) -> list[tuple[str, int, float, float, float]]:
        """(kind of module, how many, smallest, mean and largest norm of change), in the model's order."""
        groups: dict[str, list[float]] = {}
        for name, norm in self.moved.items():
            groups.setdefault(name.rpartition(".")[2], []).append(norm)
        return [(kind, len(n), min(n), sum(n) / len(n), max(n)) for kind, n in groups.items()]

    def parts(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Kind of module -> part -> means of its norms at the start and at the end."""
        groups: dict[tuple[str, str], list[tuple[float | None, float]]] = {}
        for (module, part), pair in self.norms.items():
            groups.setdefault((module.rpartition(".")[2], part), []).append(pair)
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for (kind, part), pairs in groups.items():
            starts = [start for start, _ in pairs if start is not None]
            found.setdefault(kind, {})[part] = {
                "start": sum(starts) / len(starts) if starts else None,
                "end": sum(end for _, end in pairs) / len(pairs),
            }
        return found

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) for the report's page."""
        share = self.num_started / max(1, self.num_base)
        trained = f"{self.num_started:,} ({share:.2%} of the base's {self.num_base:,})"
        if self.num_trained != self.num_started:
            trained += f", {self.num_trained:,} of them left at the end"
        return [("method", self.method), ("trained parameters", trained), *self.facts]

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
            "method": self.method, "trained_parameters": self.num_started,
            "trained_parameters_at_the_end": self.num_trained, "base_parameters": self.num_base, **dict(self.facts),
            "moved": {kind: {"modules": count, "min": low, "mean": mean, "max": high}
                      for kind, count, low, mean, high in self.kinds()},
            "norms": self.parts(),
        }  # fmt: skip
