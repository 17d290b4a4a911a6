"""What must not go wrong silently: a parameter without gradient, a loss that is not finite, a module that never
moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alpaca_lora.adapters.base import Adapter
from alpaca_lora.data.examples import StepBatch
from alpaca_lora.errors import NumericalError
from alpaca_lora.training.durable import replace_file
from alpaca_lora.training.micro_batch import describe
from alpaca_lora.training.optimizer import FlatAdamW


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


def check_acted(adapter: Adapter, num_steps: int) -> None:
    """NumericalError naming the modules whose update is still zero after ``num_steps`` > 0, or when the method did not
    do what it is for.
    """
    if num_steps:
        adapter.check_acted()
    still = [name for name, norm in adapter.moved().items() if not norm > 0]
    if still and num_steps:
        raise NumericalError(
            f"{len(still)} modules did not move in {num_steps} steps: {', '.join(still[:5])}",
            fix="check that the rows have supervised tokens and that the learning rate is not negligible",
        )


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
