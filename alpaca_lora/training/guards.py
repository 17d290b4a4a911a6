"""What must not go wrong silently: a parameter without gradient, a loss that is not finite, a module that never
moved, a frozen weight that did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.data.examples import StepBatch
from alpaca_lora.errors import NumericalError
from alpaca_lora.models.layers import Embedding
from alpaca_lora.models.linear import PackedLinear
from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.micro_batch import describe
from alpaca_lora.training.optimizer import FlatAdamW

LEAST_CHANGE = 1e-12  # norm of a module's change below which float32 shows it in no output


@contextmanager
def gradients_watched(optimizer: FlatAdamW) -> Iterator[None]:
    """NumericalError when a backward pass inside did not reach every trained parameter.

    Hooks and not values: gradients are views of one buffer, never None, and lora_A's first gradient is rightly all
    zeros.
    """
    # AdaLoRA leaves some without an element
    parameters, reached = [(n, p) for n, p in optimizer.named_parameters() if p.numel()], set[str]()
    handles = [p.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name)) for name, p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, _ in parameters if name not in reached]
    if missed:
        raise NumericalError(
            f"{len(missed)} of {len(parameters)} trained parameters get no gradient: {', '.join(missed[:5])}",
            fix="choose targets that take part in the model's forward pass",
        )


def check_acted(adapter: Adapter, num_steps: int, optimizer: FlatAdamW | None = None) -> None:
    """NumericalError naming the modules whose update is still nothing after ``num_steps`` > 0; or when the method did
    not do what it is for; or, with the run's ``optimizer``, when that trained a parameter at another rate than the
    method asks for.
    """
    if not num_steps:
        return
    still = [name for name, norm in adapter.moved().items() if not norm > LEAST_CHANGE]
    if still:
        raise NumericalError(
            f"{len(still)} modules did not move in {num_steps} steps: {', '.join(still[:5])}",
            fix="check that the rows have supervised tokens and that the learning rate is not negligible",
        )
    adapter.check_acted()
    for name, ratio in (optimizer.ratios() if optimizer is not None else {}).items():
        if ratio != (asked := adapter.learning_rate_ratio(name)):
            raise NumericalError(
                f"was trained at {ratio:g} times the learning rate, method {adapter.method} asks for {asked:g}",
                field=name,
            )


class FrozenCheck:
    """That the weights which are not trained stay what they are, bit for bit.

    A checksum of each is taken when this is made (once the run's weights are in place) and compared by `check`: the
    bytes as 64-bit numbers, added up. That is one pass over the memory without a copy (135M weights in bfloat16 on one
    core: 0.02 s), and whole numbers add up to the same in any order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                self._frozen |= {f"{name}.{part}": buffer for part, buffer in module.named_buffers()}
        self._tables = [module for module in model.modules() if isinstance(module, Embedding)]
        self._sums = self._count()

    def _count(self) -> list[int]:
        sums = _checksums(self._frozen.values())
        for table in self._tables:
            table.release()
        return sums

    def check(self) -> None:
        """NumericalError naming the modules of which a weight is another one now."""
        sums = self._count()
        changed = [name for name, one, other in zip(self._frozen, sums, self._sums, strict=True) if one != other]
        if changed:
            modules = list(dict.fromkeys(name.rpartition(".")[0].replace(".base", "") or name for name in changed))
            raise NumericalError(
                f"{len(changed)} of {len(sums)} frozen weights were changed: {', '.join(modules[:5])}",
                expected="the base model as it was", fix="this is a defect of the program: please report it",
            )  # fmt: skip


def _checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """One whole number for each tensor."""
    sums = [_checksum(tensor.detach()) for tensor in tensors]
    devices = {one.device for one in sums}
    by_device = {device: iter(torch.stack([s for s in sums if s.device == device]).tolist()) for device in devices}
    return [next(by_device[one.device]) for one in sums]


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bytes, as the widest whole numbers that they divide into; a scalar on its device."""
    flat, size = tensor.contiguous().view(-1), tensor.element_size()
    widths = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    fits = (w for w in widths if flat.numel() * size % w == 0 and flat.storage_offset() * size % w == 0)
    return flat.view(widths[next(fits)]).sum(dtype=torch.int64)


def not_finite(
    batch: StepBatch, losses: list[float], grad_norm: float, optimizer: FlatAdamW, *,
    folder: Path | None, last_good: str, say: Callable[[str], None],
) -> NumericalError:  # fmt: skip
    """The error of a step that was not taken; writes ``nonfinite-step-N.json`` with the micro-batches that did it.

    These are all of the step where each loss was finite and only the gradient was not. N counts from 1, as the log
    does.
    """
    number = batch.step + 1
    guilty = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    report = {
        "step": number, "losses": losses, "grad_norm": grad_norm, "nonfinite_gradients": optimizer.nonfinite(),
        "micro_batches": [describe(batch.micro_batches[i]) for i in guilty or range(len(losses))],
    }  # fmt: skip
    where = ""
    if folder is not None:
        path = folder / f"nonfinite-step-{number}.json"
        try:
            replace_file(path, json.dumps(report).encode())
            where = f"; its rows and tokens are in {path}"
        except OSError as error:  # the finding matters more than its record
            say(f"{path} cannot be written ({error.strerror})")
    return NumericalError(
        f"step {number}: loss {sum(losses)}, gradient norm {grad_norm}; no update was made{where}; {last_good}",
        fix="a lower learning_rate, a look at those rows, or --dtype float32 may help",
    )
