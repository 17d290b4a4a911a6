"""Which trained parts of an adapter left where they started: a checksum of each is kept, no copy.

Knows modules and parts by name (lora_A, lora_B, a magnitude); knows no method.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

Parts = Iterable[tuple[str, str, torch.Tensor]]  # (module, part, its value)
PATIENCE = 2  # steps that a part may stand still after something of its module has moved


class Movement:
    """What is known of one run. norms: (module, part) -> norm before the first step.

    A part that stands still while others of its module move is no part of what is trained, whatever the method's name.
    It is looked at after each step until it has moved, and for what it was in the run, not for the weights kept in the
    end: at the best step, say the first, lora_A has not had a gradient yet.
    """

    def __init__(self, parts: Parts) -> None:
        self._start: dict[tuple[str, str], int] = {}
        self.norms: dict[tuple[str, str], float] = {}
        self._waited: dict[str, int] = {}  # module -> steps since something of it moved
        self.begin_at(parts)
        self._still = set(self._start)

    def begin_at(self, parts: Parts) -> None:
        """Say where parts started, in the place of what they were when the run was taken up."""
        for module, part, tensor in parts:
            self._start[module, part] = _checksum(tensor)
            self.norms[module, part] = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))

    def note(self, parts: Parts) -> None:
        """Look at the parts after one more step."""
        if self._still:
            waiting = set(self._waited)
            self._look(parts)
            for module in waiting:
                self._waited[module] += 1

    def stuck(self, parts: Parts) -> dict[str, list[str]]:
        """Part -> the modules in which it never moved although others of the module did, `PATIENCE` steps ago."""
        self._look(parts)
        found: dict[str, list[str]] = {}
        for module, part in self._start:
            if (module, part) in self._still and self._waited.get(module, 0) >= PATIENCE:
                found.setdefault(part, []).append(module)
        return found

    def _look(self, parts: Parts) -> None:
        seen = set()
        for module, part, tensor in parts:
            key = module, part
            if key in self._still and (not tensor.numel() or _checksum(tensor) != self._start[key]):
                seen.add(key)
        self._still -= seen
        for module, _ in seen:
            self._waited.setdefault(module, 0)


def _checksum(tensor: torch.Tensor) -> int:
    values = tensor.detach().to("cpu", torch.float32).contiguous().view(-1).numpy()
    return zlib.crc32(values)  # pyright: ignore[reportArgumentType]
