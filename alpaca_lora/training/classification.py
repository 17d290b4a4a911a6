"""Texts to classify: the loss, and how a validation batch is judged. What is counted is in
`classification_figures.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from alpaca_lora.data.examples import Batch
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import class_logits
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.training.classification_figures import confusion_matrix, describe


def predict(model: CausalLM, batch: Batch) -> torch.Tensor:
    """float32 logits_NC of each segment, from the hidden state of its last token."""
    hidden_TD = model(batch.ids_T, batch.positions_T, Packed(batch.lengths))
    return class_logits(model, hidden_TD.index_select(0, batch.label_rows_N))


def class_weights(class_counts: Sequence[int]) -> list[float]:
    """n / (k * count) of each of the k classes of n rows: every class counts the same in all, and the mean over the
    rows is 1, so that the learning rate means what it meant without weights.
    """
    num_rows = sum(class_counts)
    return [num_rows / (len(class_counts) * count) for count in class_counts]


class ClassificationLoss:
    """The loss of a classification run, and the judge of its validation batches.

    Loss: sum over the rows of weight(class) * -log p(class), divided by ``num_supervised``, the rows of the whole
    optimizer batch. The divisor does not know the weights, so the micro-batches' losses add up however the batch is
    cut. Validation batches are judged by the same loss and by the classes that the model gives them, in one run of
    it.
    """

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        """``weights``: one per class; None: all 1."""
        self._weight_C = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self._figure = "accuracy" if weights is None else "macro_f1"  # what the best step has most of
        self.criterion = "validation accuracy" if weights is None else "validation macro-F1"

    def __call__(self, model: CausalLM, batch: Batch, num_supervised: int) -> torch.Tensor:
        return self._sum(predict(model, batch), batch) / num_supervised

    def _sum(self, logits_NC: torch.Tensor, batch: Batch) -> torch.Tensor:
        weight_C = None if self._weight_C is None else self._weight_C.to(logits_NC.device)
        return F.cross_entropy(logits_NC, batch.label_ids_N, weight_C, reduction="sum")

    def measure(self, model: Any, batch: Batch) -> tuple[float, np.ndarray]:
        """(summed loss, confusion_CC) of one batch."""
        logits_NC = predict(model, batch)
        predicted_N, num_classes = logits_NC.argmax(1).cpu().numpy(), logits_NC.shape[1]
        confusion_CC = confusion_matrix(predicted_N, batch.label_ids_N.cpu().numpy(), num_classes)
        return float(self._sum(logits_NC, batch)), confusion_CC

    def figures(self, measured: Sequence[np.ndarray]) -> dict[str, Any]:
        """See `classification_figures.describe`."""
        return describe(np.sum(measured, axis=0))

    def rank(self, loss: float, figures: dict[str, Any]) -> list[float]:
        """Lower is better: a higher accuracy, or with weights a higher macro-F1, because who asks that every class
        counts the same wants that measured; of equal ones the lower loss.
        """
        return [-figures[self._figure], loss]


@torch.no_grad()
def evaluate_classes(model: CausalLM, batches: Iterable[Batch]) -> dict[str, Any]:
    """Mean ``loss`` per row, without weights, and the figures of a model on its own."""
    judge, losses, measured = ClassificationLoss(), 0.0, []
    for batch in batches:
        loss, confusion_CC = judge.measure(model, batch)
        losses += loss
        measured.append(confusion_CC)
    return {"loss": losses / int(np.sum(measured)), **judge.figures(measured)}
