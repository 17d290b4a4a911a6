"""How much each layer keeps for its backward pass: what the levels of models/recompute.py keep is counted, and the
cheapest mix that fits into memory is chosen. Knows bytes and levels; measures nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.recompute import LEVELS, Level, is_made_again, storages

Kept = Mapping[Level, Sequence[int]]  # level -> bytes that each layer keeps at it, lowest layer first
IN_WORDS: Mapping[Level, str] = {
    "none": "nothing", "norms": "norms", "mlp": "norms and feed-forward", "layer": "everything",
    "disk": "norms, the rest read from a file,",
}  # fmt: skip
# what a layer is raised to where there is room, the cheapest in memory first. What lies in a file is not made again
RAISED: Mapping[Level, tuple[Level, ...]] = {"layer": ("mlp", "norms", "none"), "disk": ("norms", "none")}


def set_levels(model: CausalLM, asked: bool | str) -> None:
    """Have the model do what the key ``gradient_checkpointing`` says; with auto and disk, what the preflight chose."""
    if isinstance(asked, bool):
        model.gradient_checkpointing = asked
    elif asked == "disk" and not isinstance(model.gradient_checkpointing, bool):
        return
    for level in LEVELS:
        if asked == level:
            model.gradient_checkpointing = (level,) * model.config.num_layers


def describe(levels: Sequence[Level]) -> str:
    """``everything in 10 layers, norms and feed-forward in 22``."""
    counts = Counter(levels)
    found: list[tuple[Level, int]] = [(level, counts[level]) for level in reversed(LEVELS) if counts[level]]
    parts = [f"{IN_WORDS[level]} in {count}" for level, count in found]
    plural = "" if found[0][1] == 1 else "s"
    return f"{parts[0]} layer{plural}" + "".join(f", {part}" for part in parts[1:])


def choose(kept: Kept, room: int, leanest: Level = "layer") -> tuple[Level, ...]:
    """Levels that keep at most ``room`` bytes more than all layers at ``leanest``, and make, or write, little.

    A byte spares about as much time whatever is kept in it (each number is a product as wide as the model), so levels
    are raised for all layers in turn. Upper layers first: theirs is given back first in the backward pass, before a
    lower layer runs again and needs room for all of its own.
    """
    layers = range(len(kept[leanest]))
    chosen: list[Level] = [leanest for _ in layers]
    for level in RAISED[leanest]:
        for i in reversed(layers):
            more = kept[level][i] - kept[chosen[i]][i]
            if more <= room:
                chosen[i], room = level, room - more
    return tuple(chosen)


def count_kept(model: CausalLM, forward: Callable[[], object], per: float = 1.0) -> Kept:
    """Bytes times ``per`` that each layer keeps at each level in a forward pass, of which one is run and nothing kept.

    Weights do not count, nor what all layers share.
    """
    found: list[_Layer] = []

    def run_layer(layer: Any, _level: Level, x_TD: torch.Tensor, *context: Any) -> torch.Tensor:
        one = _Layer(storages(model) | storages(context))
        with saved_tensors_hooks(one.note_attention, _never):
            middle_TD = layer.add_attention(x_TD, *context)
        with saved_tensors_hooks(one.note_mlp, _never):
            out_TD = layer.add_mlp(middle_TD)
        one.finish(x_TD, middle_TD)
        found.append(one)
        return out_TD

    vars(model)["run_layer"] = run_layer
    try:
        forward()
    finally:
        del vars(model)["run_layer"]
    layers = found[-model.config.num_layers :]  # before them, those that made a prefix
    return {level: [int(one.num_bytes[level] * per) for one in layers] for level in LEVELS}


@dataclass
class _Layer:
    """What one layer saves. Tensors are held until all are noted, or their memory would be taken for another's."""

    shared: set[int]
    attention: list[tuple[torch.Tensor, bool]] = field(default_factory=list)  # tensor, whether it can be made again
    mlp: list[tuple[torch.Tensor, bool]] = field(default_factory=list)
    num_bytes: dict[Level, int] = field(default_factory=dict)

    def note_attention(self, tensor: torch.Tensor) -> None:
        self.attention.append((tensor, is_made_again(tensor)))

    def note_mlp(self, tensor: torch.Tensor) -> None:
        self.mlp.append((tensor, is_made_again(tensor)))

    def finish(self, x_TD: torch.Tensor, middle_TD: torch.Tensor) -> None:
        """Add up; a level never keeps more than the one before."""
        first, second = ([tensor for tensor, again in part if not again] for part in (self.attention, self.mlp))
        everything = [tensor for tensor, _ in (*self.attention, *self.mlp)]
        kept = {"none": everything, "norms": [*first, *second], "mlp": [*first, middle_TD], "layer": [x_TD], "disk": []}
        most = None
        for level in LEVELS:
            size = self._size(kept[level])
            self.num_bytes[level] = most = size if most is None else min(size, most)
        self.attention, self.mlp = [], []

    def _size(self, tensors: Sequence[torch.Tensor]) -> int:
        storages = {(s := tensor.untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors}
        return sum(size for address, size in storages.items() if address not in self.shared)


def _never(_: Any) -> Any:
    raise AssertionError("nothing was kept to go back with")
