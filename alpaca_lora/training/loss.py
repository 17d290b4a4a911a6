"""From a micro-batch to its share of the loss; the only place of the room that knows what a model's forward looks
like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from alpaca_lora.data.examples import Batch
from alpaca_lora.kernels.cross_entropy import linear_cross_entropy
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM


class Loss(Protocol):
    """What the trainer calls: a float32 scalar that a backward pass starts from."""

    def __call__(self, model: Any, batch: Batch, num_supervised: int) -> torch.Tensor: ...


class Judge(Protocol):
    """How a validation batch is judged. Losses are summed by the trainer; ``measure`` runs the model once."""

    criterion: str  # what `rank` looks at first, in words: no better ... in 3 evaluations

    def measure(self, model: Any, batch: Batch) -> tuple[float, Any]:
        """(summed loss, what `figures` needs of this batch)."""
        ...

    def figures(self, measured: Sequence[Any]) -> dict[str, Any]:
        """What is said of all batches besides the loss, for example the accuracy; JSON values."""
        ...

    def rank(self, loss: float, figures: dict[str, Any]) -> list[float]:
        """Lower is better, compared number by number."""
        ...


class LossOnly:
    """The judge of generation: the loss says it all."""

    criterion = "validation loss"

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def measure(self, model: Any, batch: Batch) -> tuple[float, Any]:
        return float(self.loss(model, batch, 1)), None

    def figures(self, measured: Sequence[Any]) -> dict[str, Any]:
        return {}

    def rank(self, loss: float, figures: dict[str, Any]) -> list[float]:
        return [loss]


def causal_lm_loss(model: CausalLM, batch: Batch, num_supervised: int) -> torch.Tensor:
    """Sum over the labelled rows of -log p(next token), divided by ``num_supervised``.

    ``num_supervised`` is that of the whole optimizer batch, so the micro-batches' losses add up to the batch's mean
    loss however the batch is cut. Only labelled rows go through the head; the full logits never exist.
    """
    hidden_TD = model(batch.ids_T, batch.positions_T, Packed(batch.lengths))
    hidden_ND = hidden_TD.index_select(0, batch.label_rows_N)
    softcap = model.config.logit_softcap
    return linear_cross_entropy(hidden_ND, model.head_weight(), batch.label_ids_N, num_supervised, softcap)
