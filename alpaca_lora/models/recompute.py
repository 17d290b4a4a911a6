"""What a layer keeps of its forward pass until its backward pass, in levels; each keeps less than the one before.

    none    recompute nothing
    norms   make the outputs of norms and gated activations again, from their inputs: a pass over memory, no product
    mlp     as norms in attention; of the feed-forward keep its input alone, and run it again as far as it is needed
            (never the last product, whose output nobody asks for)
    layer   keep the layer's input alone, and run the layer again as far as it is needed (Chen et al. 2016)
    disk    as norms, but what is kept lies in a file (models/activation_file.py)

Bytes of memory per token and layer of LLaMA-7B in bfloat16 with LoRA on q, k, v and o: 100, 92, 48, 8 and 0 KiB. All
levels give the same numbers. Knows autograd, not models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from alpaca_lora.models.activation_file import SMALLEST, ActivationFile, StoredTensor

Level = Literal["none", "norms", "mlp", "layer", "disk"]
LEVELS: tuple[Level, ...] = ("none", "norms", "mlp", "layer", "disk")


def made_again(level: Level) -> AbstractContextManager[object]:
    """Inside, nodes do not keep what a kernel with ``remake`` made, but how to make it again (not at "none"; at "disk"
    `stored` sees to it).
    """
    return nullcontext() if level in ("none", "disk") else saved_tensors_hooks(_pack, _unpack)


@contextmanager
def stored(file: ActivationFile, shared: object) -> Iterator[None]:
    """Inside, nodes keep in ``file`` what cannot be made again. ``shared``: a module or nested tuples whose tensors are
    there anyway and stay.
    """
    writer = _Writer(file, storages(shared))
    try:
        with saved_tensors_hooks(writer.pack, _unpack):
            yield
    finally:
        writer.written.clear()  # torch goes on holding the hook


def rerun(function: Callable[..., torch.Tensor], x_TD: torch.Tensor, *context: object) -> torch.Tensor:
    """``function(x_TD, *context)``, of which only the arguments are kept; it runs again in the backward pass, up to the
    last tensor that this asks for.
    """
    # dropout is a pure function of its key, so torch's generator need not be kept
    return checkpoint(function, x_TD, *context, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore


class _Recipe:
    """The node that made a tensor. It has its own backward pass after every node that saved the tensor, so what it
    keeps is still there.
    """

    __slots__ = ("node",)

    def __init__(self, node: Any) -> None:
        self.node = node


def is_made_again(tensor: torch.Tensor) -> bool:
    """Whether the kernel that made it can make it again."""
    return hasattr(getattr(tensor.grad_fn, "_forward_cls", None), "remake")


def storages(held: object) -> set[int]:
    """Addresses of the memory of a module's weights, or of the tensors in nested tuples."""
    if isinstance(held, torch.Tensor):
        return {held.untyped_storage().data_ptr()}
    if isinstance(held, nn.Module):
        return {address for one in (*held.parameters(), *held.buffers()) for address in storages(one)}
    return {address for one in held for address in storages(one)} if isinstance(held, tuple) else set()


class _Writer:
    """Writes each tensor once, however many nodes save it."""

    def __init__(self, file: ActivationFile, shared: set[int]) -> None:
        self.file, self.shared = file, shared
        # tensors are held until the layer is through, or their memory would be taken for another's
        self.written: dict[Any, tuple[torch.Tensor, StoredTensor]] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Recipe | StoredTensor:
        if is_made_again(tensor):
            return _Recipe(tensor.grad_fn)
        storage = tensor.untyped_storage().data_ptr()
        if storage in self.shared or tensor.numel() * tensor.element_size() < SMALLEST:
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        if key not in self.written:
            self.written[key] = tensor, self.file.write(tensor)
        return self.written[key][1]


def _pack(tensor: torch.Tensor) -> torch.Tensor | _Recipe:
    return _Recipe(tensor.grad_fn) if is_made_again(tensor) else tensor


def _unpack(kept: torch.Tensor | _Recipe | StoredTensor) -> torch.Tensor:
    if isinstance(kept, StoredTensor):
        return kept.read()
    return kept.node._forward_cls.remake(kept.node) if isinstance(kept, _Recipe) else kept
