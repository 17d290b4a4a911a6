"""Where an adapter beside a quantized base begins when it is to begin at what quantizing took from the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.commands.bar import Bar
from alpaca_lora.commands.job import Job, speaker
from alpaca_lora.data.prepare import Prepared
from alpaca_lora.quantization.layer_walk import LayerWalk
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import dense_source
from alpaca_lora.quantization.rounding_error import FIELD, Wanted, fit_rounding_errors
from alpaca_lora.training.signals import SignalFlag

START_TOKENS = 16_384  # of the training rows: ten for each input of the widest linear of a model of 135M


def start_at_rounding_error(job: Job, console: Console, signals: SignalFlag) -> None:
    """Fit the pairs on the first training rows and put them into the adapter; says how much of the error they take.

    ConfigError when the dense weights are not those that the base was made of, or the rows are too few.
    """
    adapter, say = job.adapter, speaker(console)
    assert isinstance(adapter, Lora)
    layers = {name: layer for name, layer in adapter.layers.items() if isinstance(layer.base, QuantizedLinear)}
    # what is packed lies in the adapted linear now, in the file it has its own name
    wanted = {f"{name}.base": Wanted(f"{name}.weight", len(layer.lora_A)) for name, layer in layers.items()}
    bar = Bar(console, "the adapter's start")

    def on_progress(done: int, total: int, what: str) -> None:
        signals.check()
        bar(done, total, what)

    with dense_source(job.base, FIELD) as source, bar.progress:
        walk = LayerWalk(job.base.model, device=job.compute.device)
        dense: Callable[[str], torch.Tensor] = lambda name: source.read(name).to(job.compute.device)  # noqa: E731
        left = fit_rounding_errors(
            walk, wanted, dense, first_rows(job.prepared, START_TOKENS),
            lambda path, a, b: layers[path.removesuffix(".base")].begin_at(a, b), on_progress,
        )  # fmt: skip
    taken = 1 - sum(left.values()) / len(left)
    say(
        f"the adapter starts at what quantizing took from the weights: {taken:.0%} of the squared error of the "
        f"outputs, mean over {len(left)} linears"
    )


def first_rows(prepared: Prepared, num_tokens: int) -> list[torch.Tensor]:
    """int64 token ids of training rows in their order, until there are ``num_tokens``."""
    rows, count = [], 0
    for row in prepared.train:
        rows.append(torch.tensor(row.ids_T, dtype=torch.int64))
        count += len(rows[-1])
        if count >= num_tokens:
            break
    return rows
