"""Texts to labels: each as if it were alone, empty ones in place, the stream rounded up as in training."""

from __future__ import annotations

import pytest
import torch

from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.data.encode_labelled import question_ids
from alpaca_lora.data.packing import ROUND_TO
from alpaca_lora.inference import classify as module
from alpaca_lora.inference.classify import Classification, classify
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score, class_logits
from alpaca_lora.models.decoder import CausalLM
from tests.tiny import ByteTokenizer, tiny_model

LABELS = ("bad", "good", "so so")
POLICY = EncodePolicy(40, add_eos_token=False)
TEXTS = ["a fine film", " \n", "bad", "x" * 64, "", "店"]


@pytest.fixture
def model() -> CausalLM:
    model = tiny_model()
    attach_score(model, LABELS, seed=3).weight.data.mul_(20)  # logits far from flat
    return model


def alone(model: CausalLM, text: str) -> list[float]:
    """The definition: one text, one forward pass, its last token."""
    asked = question_ids([text], ByteTokenizer(), POLICY)[0]
    assert asked is not None
    ids_T = torch.tensor(asked[0])
    with torch.no_grad():
        hidden_TD = model(ids_T, torch.arange(len(ids_T)), Packed([len(ids_T)]))
        return class_logits(model, hidden_TD[-1:])[0].softmax(-1).tolist()


@pytest.mark.parametrize("tokens_at_once", [2048, 50, 1])
def test_each_text_is_classified_as_if_it_were_alone(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens_at_once)
    streams: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: streams.append(len(inputs[0])))
    found = classify(model, ByteTokenizer(), TEXTS, LABELS, POLICY)
    assert streams and all(length % ROUND_TO == 0 for length in streams)
    assert [one is None for one in found] == [False, True, False, False, True, False]
    for text, one in zip(TEXTS, found, strict=True):
        if one is None:
            continue
        assert [one.probabilities[label] for label in LABELS] == pytest.approx(alone(model, text), abs=1e-5)
        assert one.label == next(iter(one.probabilities)) == max(LABELS, key=one.probabilities.__getitem__)
        assert one.prompt_tokens == min(40, 1 + len(text.encode())) and one.truncated == (len(text) == 64)
    assert len({one.label for one in found if isinstance(one, Classification)}) > 1


def test_nothing_to_classify_is_no_forward_pass(model: CausalLM) -> None:
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    assert classify(model, ByteTokenizer(), ["", " "], LABELS, POLICY) == [None, None]
    assert classify(model, ByteTokenizer(), [], LABELS, POLICY) == []


def test_a_text_is_cleaned_as_the_training_was(model: CausalLM) -> None:
    texts = ["\x00a b", "a b"]
    cleaned, raw = (classify(model, ByteTokenizer(), texts, LABELS, POLICY, skip) for skip in ([], ["all"]))
    assert cleaned[0] == cleaned[1] == raw[1] and raw[0] != raw[1]
