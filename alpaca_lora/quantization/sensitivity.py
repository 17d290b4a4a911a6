"""How much the loss suffers when one linear alone is quantized: for each linear and each scheme that it may get.

With dW what the scheme changes, x_t what the linear sees at token t and g_t the gradient of the rows' loss at its
output, the second-order growth of the loss with the Fisher matrix in place of the Hessian is

    1/2 mean_t (g_t . dW x_t)^2

One forward and one backward pass over the rows give it for all linears and schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.quantization.scheme import Scheme

LOGIT_ROWS = 256  # rows of logits at a time

Growth = dict[str, list[float]]  # linear -> growth of the loss for each of its candidates, in nats per token


def measure_sensitivity(
    model: CausalLM, candidates: Mapping[str, Sequence[Scheme]], rows: Sequence[torch.Tensor],
    on_row: Callable[[int, int], None] | None = None,
) -> Growth:  # fmt: skip
    """For each linear (dense, by name) and each of its candidate schemes. Nothing of the model changes."""
    growth: Growth = {name: [0.0] * len(schemes) for name, schemes in candidates.items()}
    changes = {name: _changes(model, name, schemes) for name, schemes in candidates.items()}
    count = sum(len(row) - 1 for row in rows)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, given: tuple[torch.Tensor, ...], y_TO: torch.Tensor) -> None:
            x_TI = given[0].detach()

            def on_gradient(g_TO: torch.Tensor) -> None:
                for place, change_OI in enumerate(changes[name]):
                    moved_T = ((x_TI @ change_OI.t()) * g_TO).sum(1, dtype=torch.float32)
                    growth[name][place] += float(moved_T.square().sum()) / (2 * count)

            y_TO.register_hook(on_gradient)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in candidates]
    try:
        with torch.enable_grad():
            for number, row in enumerate(rows):
                row_loss(model, row).backward()
                if on_row is not None:
                    on_row(number + 1, len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return growth


def _changes(model: CausalLM, name: str, schemes: Sequence[Scheme]) -> list[torch.Tensor]:
    """What each scheme does to the weight, in the model's dtype."""
    linear: Any = model.get_submodule(name)
    weight = linear.weight.detach()
    num_out, num_in = weight.shape
    changes = []
    for scheme in schemes:
        parts = scheme.quantize(weight, name=name)
        decoded = scheme.tile(parts, (num_out, num_in), slice(0, num_out), slice(0, num_in), torch.float32)
        changes.append((decoded - weight.float()).to(weight.dtype))
    return changes


def row_loss(model: CausalLM, row_T: torch.Tensor) -> torch.Tensor:
    """Sum of -log p of a row's tokens but the first, in nats; differentiable in the activations."""
    row_T = row_T.to(model.embeddings.weight.device)
    x_TD = model.embed(row_T)
    if torch.is_grad_enabled():
        x_TD = x_TD.requires_grad_()
    positions_T = torch.arange(len(row_T), device=row_T.device)
    hidden_TD = model.final_norm(model.run_layers(x_TD, positions_T, Packed([len(row_T)])))[:-1]
    parts = [
        F.cross_entropy(model.logits(some), row_T[1:][start : start + LOGIT_ROWS], reduction="sum")
        for start, some in ((s, hidden_TD[s : s + LOGIT_ROWS]) for s in range(0, len(hidden_TD), LOGIT_ROWS))
    ]
    return torch.stack(parts).sum()


@torch.no_grad()
def mean_loss(model: CausalLM, rows: Sequence[torch.Tensor]) -> float:
    """Mean of -log p over the rows' tokens but each row's first, in nats."""
    return sum(float(row_loss(model, row)) for row in rows) / sum(len(row) - 1 for row in rows)
