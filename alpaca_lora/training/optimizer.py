"""AdamW over one flat float32 buffer; knows names and shapes, nothing of models.

Weights, gradients and both averages (training/averages.py) are one buffer each: a step is a dozen operations on long
runs instead of a dozen for each of hundreds of small tensors. A float32 parameter is a view of the weights and its
gradient one of the gradients. A parameter in another dtype (bfloat16) stays a tensor of its own, the rounded copy of
its float32 master in the buffer; its gradient is added to the buffer and freed as soon as a backward pass has made it,
so micro-batches add up in float32 and no more than one such gradient is there at a time. Source: Loshchilov and Hutter,
"Decoupled Weight Decay Regularization" (2019), algorithm 2.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from alpaca_lora.adapters.base import Kept
from alpaca_lora.errors import ModelFileError
from alpaca_lora.training.averages import BLOCK, KINDS, Kind

# floats: each view begins on a 64-byte line, as a tensor of its own would, and shares no block of its averages
ALIGNMENT = BLOCK
# floats updated at a time: the four buffers' parts stay in the cache, and the only temporary is as small. 134M floats
# on two cores took 0.15 s so, and 0.44 s in one piece
CHUNK = 2**19
HOOK = "_flat_adamw_hook"  # attribute of a parameter that is no view: the hook of the optimizer that owns it


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one parameter lies in the flat buffers. address: of the parameter's data, to notice a move."""

    name: str
    parameter: nn.Parameter
    start: int
    shape: torch.Size
    ratio: float
    address: int = 0

    @property
    def size(self) -> int:
        return self.shape.numel()

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def is_view(self) -> bool:
        return self.parameter.dtype == torch.float32

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.span].view(self.shape)


class FlatAdamW:
    """AdamW, decoupled weight decay, bias-corrected; equal to ``torch.optim.AdamW`` up to float32 rounding.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p (1 - lr decay) - lr m' / (sqrt(v') + eps), primes
    bias-corrected. ``ratio``: parameter name -> its learning rate over the step's (LoRA+). ``averages``: how m and v
    are kept, ``folder``: where, if on a disk.

    Takes the given parameters over, from an older one too if there is; who moves one afterwards (``module.to(...)``)
    takes it out of the optimizer's reach, which `step` notices. ``updates`` counts the steps taken.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *,
        beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0,
        ratio: Callable[[str], float] = lambda name: 1.0, averages: Kind = "float32", folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.updates = 0
        given = list(named_parameters)
        assert given, "nothing to train"
        self._names = [name for name, _ in given]
        ratios = {name: ratio(name) for name, _ in given}
        # equal ratios side by side: a step takes one run for each, whatever the order of the parameters
        order = list(dict.fromkeys(ratios.values()))
        given.sort(key=lambda pair: order.index(ratios[pair[0]]))
        slots: list[_Slot] = []
        for name, parameter in given:
            slots.append(_Slot(name, parameter, _end(slots), parameter.shape, ratios[name]))
        device = given[0][1].device
        # the padding between views stays zero everywhere, so sums over the buffers are sums over the parameters
        self._weights, self._grads = (torch.zeros(_end(slots), dtype=torch.float32, device=device) for _ in range(2))
        self._averages = KINDS[averages](_end(slots), device, folder)
        self._hooks: dict[str, RemovableHandle] = {}
        for slot in slots:
            slot.view(self._weights).copy_(slot.parameter.detach())
            if not slot.is_view:
                slot.parameter.grad = None
                self._hooks[slot.name] = _take_over(slot.parameter, _collector(weakref.ref(self), slot.name))
        self._place(slots)

    def _place(self, slots: list[_Slot]) -> None:
        """Point the parameters into the buffers, in which ``slots`` say where they lie."""
        placed = []
        for slot in slots:
            if slot.is_view:
                slot.parameter.grad = None  # of another shape, perhaps, which torch would refuse
                slot.parameter.data = slot.view(self._weights)
                slot.parameter.grad = slot.view(self._grads)
            elif slot.parameter.shape != slot.shape:
                slot.parameter.data = slot.view(self._weights).to(slot.parameter.dtype)
            placed.append(replace(slot, address=slot.parameter.data_ptr()))
        self._slots = {slot.name: slot for slot in placed}
        self._runs = [
            (group[0].start, _end(group), ratio)
            for ratio, items in groupby(placed, key=lambda slot: slot.ratio)
            if (group := list(items))
        ]

    def collect(self, name: str) -> None:
        """Add the gradient that a backward pass left at a parameter that is no view to the buffer, and free it."""
        slot = self._slots[name]
        if slot.parameter.grad is not None:
            slot.view(self._grads).add_(slot.parameter.grad)
            slot.parameter.grad = None

    def select(self, kept: Mapping[str, Kept]) -> None:
        """Let parameters shrink to the rows or columns kept, with their averages; what is left trains on as it was.

        All buffers are made anew, one after the other; gradients are zero afterwards.
        """
        assert kept.keys() <= self._slots.keys(), f"not trained here: {sorted(kept.keys() - self._slots.keys())}"
        old, slots = list(self._slots.values()), list[_Slot]()
        for slot in old:
            shape = list(slot.shape)
            if (keep := kept.get(slot.name)) is not None:
                shape[keep.dim] = len(keep.index)
            slots.append(_Slot(slot.name, slot.parameter, _end(slots), torch.Size(shape), slot.ratio))

        weights, averages = self._weights.new_zeros(_end(slots)), self._averages.empty(_end(slots))
        for before, after in zip(old, slots, strict=True):
            keep = kept.get(before.name)
            mean, square, some = (
                flat if keep is None else _kept(flat.view(before.shape), keep).view(-1)
                for flat in (*self._averages.read(before.span), self._weights[before.span])
            )
            averages.write(after.span, mean, square)
            weights[after.span] = some
        self._weights, self._averages = weights, averages
        self._grads = torch.zeros_like(self._weights)
        self._place(slots)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) in the order given."""
        return [(name, self._slots[name].parameter) for name in self._names]

    def ratios(self) -> dict[str, float]:
        """Parameter name -> the factor of the learning rate that a step uses for it."""
        found = {}
        for name, slot in self._slots.items():
            found[name] = next((r for first, end, r in self._runs if first <= slot.start < end), slot.ratio)
        return found

    def zero_grad(self) -> None:
        self._grads.zero_()
        for slot in self._slots.values():
            if not slot.is_view:
                slot.parameter.grad = None  # what a backward pass that failed may have left

    def grad_norm(self) -> float:
        """Euclidean norm of the whole gradient; not finite if any element is not."""
        return float(torch.linalg.vector_norm(self._grads))

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradient, of norm ``norm``, down to ``max_norm``; 0 leaves it."""
        if max_norm and norm > max_norm:
            self._grads.mul_(max_norm / norm)

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient has an Inf or NaN."""
        return [name for name in self._names if not bool(torch.isfinite(self._slots[name].view(self._grads)).all())]

    def step(self, learning_rate: float) -> None:
        """One update of all parameters with the gradient as it stands."""
        for slot in self._slots.values():
            assert slot.parameter.data_ptr() == slot.address, f"{slot.name} was moved"
            owned = slot.is_view or getattr(slot.parameter, HOOK, None) is self._hooks[slot.name]
            assert owned, f"{slot.name} was taken over by another optimizer"
        self.updates += 1
        for start, end, ratio in self._runs:
            for first in range(start, end, CHUNK):
                self._update(slice(first, min(first + CHUNK, end)), learning_rate * ratio)
        self._round()

    def _update(self, part: slice, learning_rate: float) -> None:
        correction1, correction2 = 1 - self.beta1**self.updates, 1 - self.beta2**self.updates
        weights, grads = self._weights[part], self._grads[part]
        mean, square = self._averages.read(part)
        if self.weight_decay:
            weights.mul_(1 - learning_rate * self.weight_decay)
        mean.lerp_(grads, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(grads, grads, value=1 - self.beta2)
        denominator = square.sqrt().mul_(correction2**-0.5).add_(self.epsilon)
        weights.addcdiv_(mean, denominator, value=-learning_rate / correction1)
        self._averages.write(part, mean, square)

    def _round(self) -> None:
        """Give the parameters that are no views their masters' values."""
        with torch.no_grad():
            for slot in self._slots.values():
                if not slot.is_view:
                    slot.parameter.copy_(slot.view(self._weights))

    def weights(self) -> torch.Tensor:
        """A copy of the flat weights; `load_weights` takes it back."""
        return self._weights.clone()

    def load_weights(self, weights: torch.Tensor) -> None:
        self._weights.copy_(weights)
        self._round()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All state by parameter name: ``weight.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``; averages in 8 bits have
        ``exp_avg_scales.NAME`` and ``exp_avg_sq_scales.NAME`` besides. Views, on the optimizer's device.
        """
        found = {f"weight.{name}": self._slots[name].view(self._weights) for name in self._names}
        for name in self._names:
            slot = self._slots[name]
            found |= {f"{kind}.{name}": one for kind, one in self._averages.tensors(slot.span, slot.shape).items()}
        return found

    def release(self) -> None:
        """Give memory back that looking at the state took."""
        self._averages.release()

    def load_state(self, tensors: Mapping[str, torch.Tensor], *, updates: int, file: str) -> None:
        """Take back `state_tensors`, in any order. ModelFileError naming what is missing, extra or misshapen."""
        expected = self.state_tensors()
        problems = [f"{name} is missing" for name in expected if name not in tensors]
        problems += [f"{name} is unknown" for name in tensors if name not in expected]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(view.shape)}"
            for name, view in expected.items()
            if name in tensors and tensors[name].shape != view.shape
        ]
        problems += [
            f"{name} is {tensors[name].dtype}, not {view.dtype}"
            for name, view in expected.items()
            if name in tensors and (tensors[name].dtype == torch.uint8) != (view.dtype == torch.uint8)
        ]
        if problems:
            shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            raise ModelFileError(shown, file=file, expected="the tensors of this adapter and base model")
        for name, view in expected.items():
            view.copy_(tensors[name])
        self.release()
        self.updates = updates
        self._round()

    def flat_weights(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weights out of `state_tensors` as `load_weights` takes them: those of the best checkpoint, say."""
        flat = torch.zeros_like(self._weights)
        for slot in self._slots.values():
            slot.view(flat).copy_(tensors[f"weight.{slot.name}"])
        return flat


def _kept(tensor: torch.Tensor, keep: Kept) -> torch.Tensor:
    return tensor.index_select(keep.dim, keep.index.to(tensor.device))


def _end(slots: list[_Slot]) -> int:
    """Where the next parameter may begin."""
    return slots[-1].start + -(-slots[-1].size // ALIGNMENT) * ALIGNMENT if slots else 0


def _collector(optimizer: weakref.ref[FlatAdamW], name: str) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter; it does not keep the optimizer, nor its buffers, alive."""

    def collect(_: torch.Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive.collect(name)

    return collect


def _take_over(parameter: nn.Parameter, collect: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Let this hook collect the parameter's gradient in the place of an older optimizer's, which would take it away."""
    if (older := getattr(parameter, HOOK, None)) is not None:
        older.remove()
    handle = parameter.register_post_accumulate_grad_hook(collect)
    setattr(parameter, HOOK, handle)
    return handle
