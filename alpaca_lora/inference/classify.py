"""Texts to labels with a model that has a head for classes: one pass over all texts, no token is generated.

Knows ids and labels; how a text becomes ids is `data.encode_labelled`, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.data.encode_labelled import question_ids
from alpaca_lora.data.packing import pack_by_length
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import class_logits
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Classification:
    """label: the likeliest; probabilities: of every label, likeliest first; truncated: the text was cut to fit."""

    label: str
    probabilities: dict[str, float]
    prompt_tokens: int
    truncated: bool


@torch.inference_mode()
def classify(
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str], policy: EncodePolicy
) -> list[Classification]:
    """One `Classification` for each text, in their order. UserError for a text of which cleaning leaves nothing.

    ``labels``: names of the head's outputs in their order; ``policy``: how rows were cut and ended in training.
    """
    device = next(model.parameters()).device
    asked = [question_ids(text, tokenizer, policy) for text in texts]
    lengths = [len(ids) for ids, _ in asked]
    found: dict[int, Classification] = {}
    for group in pack_by_length(lengths, TOKENS_AT_ONCE):
        members = [int(member) for member in group]
        own = [lengths[member] for member in members]
        ids_T = torch.tensor([token for member in members for token in asked[member][0]], device=device)
        positions_T = torch.cat([torch.arange(length, device=device) for length in own])
        hidden_TD = model(ids_T, positions_T, Packed(own))
        last_N = torch.tensor(own, device=device).cumsum(0) - 1
        for member, shares in zip(members, class_logits(model, hidden_TD[last_N]).softmax(-1).tolist(), strict=True):
            ranked = sorted(zip(shares, labels, strict=True), key=lambda pair: -pair[0])
            probabilities = {label: share for share, label in ranked}
            found[member] = Classification(ranked[0][1], probabilities, lengths[member], asked[member][1])
    return [found[number] for number in range(len(texts))]
