"""The loss of a classification run and the judge of its validation: however a batch is cut, the same."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample
from alpaca_lora.errors import UserError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.training.classification import ClassificationLoss, class_weights, evaluate_classes, predict
from alpaca_lora.training.loss import LossOnly
from alpaca_lora.training.micro_batch import rounded_up, shrink
from tests.tiny import tiny_model
from tests.training.tiny_run import table

NUM_CLASSES = 3


def rows() -> list[TokenizedExample]:
    return [dataclasses.replace(row, label=row.index * 2 % NUM_CLASSES) for row in table()]


def classifier() -> CausalLM:
    model = tiny_model()
    attach_score(model, NUM_CLASSES, seed=3).weight.data.mul_(20)  # logits far from flat
    return model


def one_by_one(model: CausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, classes) of each row in a forward pass of its own: the definition."""
    batches = [Batch.pack([row]) for row in rows()]
    hidden = [model(b.ids_T, b.positions_T, Packed(b.lengths))[-1] for b in batches]
    assert model.score is not None
    logits = torch.stack(hidden) @ model.score.weight.T
    return logits, torch.tensor([row.label for row in rows()])


def test_each_segment_is_classified_by_its_last_token() -> None:
    model = classifier()
    logits, classes = one_by_one(model)
    batch = Batch.pack(rows())
    for stream in (batch, rounded_up(batch)):
        torch.testing.assert_close(predict(model, stream), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(stream.label_ids_N, classes)
    assert not torch.allclose(predict(model, batch), logits.roll(1, 0), atol=0.1)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]])
def test_the_loss_is_the_mean_of_the_weighted_cross_entropies(weights: list[float] | None) -> None:
    model = classifier()
    logits, classes = one_by_one(model)
    weight = torch.tensor(weights or [1.0] * NUM_CLASSES)
    expected = -(F.log_softmax(logits.double(), -1)[range(len(classes)), classes] * weight[classes]).mean()
    loss = ClassificationLoss(weights)(model, Batch.pack(rows()), len(rows()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]])
def test_loss_and_gradient_do_not_depend_on_the_cut(weights: list[float] | None) -> None:
    whole = StepBatch(0, 0, (Batch.pack(rows()),))
    found = []
    for step in (whole, shrink(whole, 40), StepBatch(0, 0, tuple(Batch.pack([row]) for row in rows()))):
        model = classifier()
        assert model.score is not None
        model.score.weight.requires_grad_(True)
        loss = ClassificationLoss(weights)
        losses = [loss(model, rounded_up(batch), step.num_supervised) for batch in step.micro_batches]
        torch.stack(losses).sum().backward()
        found.append((torch.stack(losses).sum().detach(), model.score.weight.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-5)
    # the mean of the micro-batches' means is another number: what the divisor is for
    parts = [
        ClassificationLoss(weights)(classifier(), batch, batch.num_supervised)
        for batch in shrink(whole, 40).micro_batches
    ]
    assert abs(float(torch.stack(parts).mean()) - float(found[0][0])) > 1e-3


def test_balanced_weights_leave_the_mean_row_at_one() -> None:
    counts = [90, 9, 1]
    weights = class_weights(counts)
    assert weights == pytest.approx([100 / 270, 100 / 27, 100 / 3])
    assert sum(n * w for n, w in zip(counts, weights, strict=True)) == pytest.approx(100)
    assert class_weights([5, 5]) == [1.0, 1.0]


def test_a_bfloat16_base_keeps_its_head_in_float32() -> None:
    model = classifier().to(torch.bfloat16)
    attach = classifier()
    model.score = attach.score
    logits = predict(model, Batch.pack(rows()))
    assert logits.dtype == torch.float32
    exact = predict(classifier(), Batch.pack(rows()))
    assert float((logits - exact).abs().mean()) < 0.1 * float(exact.std())


def test_the_judge_runs_the_model_once_and_counts_every_row_once() -> None:
    model = classifier()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    judge = ClassificationLoss()
    batches = [Batch.pack(rows()[:4]), rounded_up(Batch.pack(rows()[4:]))]
    with torch.no_grad():
        measured = [judge.measure(model, batch) for batch in batches]
        assert len(calls) == len(batches)
        logits, classes = one_by_one(model)
        total = float(judge(model, Batch.pack(rows()), 1))
    assert math.fsum(loss for loss, _ in measured) == pytest.approx(total, rel=1e-5)
    figures = judge.figures([found for _, found in measured])
    right = (logits.argmax(1) == classes).float().mean()
    assert figures["accuracy"] == pytest.approx(float(right)) and 0 < right < 1
    assert sum(map(sum, figures["confusion"])) == len(rows())
    alone = evaluate_classes(model, batches)
    assert alone["loss"] == pytest.approx(total / len(rows()), rel=1e-5)
    assert {key: alone[key] for key in figures} == figures


def test_better_is_a_higher_accuracy_and_then_a_lower_loss() -> None:
    judge, weighted = ClassificationLoss(), ClassificationLoss([1.0, 1.0])
    low, high = ({"accuracy": a, "macro_f1": f} for a, f in ((0.8, 0.6), (0.9, 0.5)))
    assert judge.rank(2.0, high) < judge.rank(1.0, low) and judge.rank(1.0, low) < judge.rank(2.0, low)
    assert weighted.rank(2.0, low) < weighted.rank(1.0, high)
    assert (judge.criterion, weighted.criterion) == ("validation accuracy", "validation macro-F1")
    assert LossOnly(judge).criterion == "validation loss"


def test_a_model_without_a_head_is_told() -> None:
    with pytest.raises(UserError, match="the model is no classifier"):
        predict(tiny_model(), Batch.pack(rows()))
