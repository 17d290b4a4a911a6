"""Texts to labels with a model that has a head for classes: one pass over all texts, no token is generated.

Knows ids and labels; how a text becomes ids is `data.encode_labelled`, as in training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.data.encode_labelled import question_ids
from alpaca_lora.data.packing import ROUND_TO, pack_by_length
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
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[str], policy: EncodePolicy,
    skip_cleaning: Collection[str] = (),
) -> list[Classification | None]:  # fmt: skip
    """One `Classification` for each text, in their order; None for a text of which cleaning leaves nothing.

    ``labels``: names of the head's outputs in their order; ``policy``, ``skip_cleaning``: how rows were cut, ended and
    cleaned in training.
    """
    asked = question_ids(texts, tokenizer, policy, skip_cleaning)
    places = [place for place, one in enumerate(asked) if one is not None]
    rows = [one for one in asked if one is not None]
    found: list[Classification | None] = [None] * len(texts)
    for group in pack_by_length([len(ids) for ids, _ in rows], TOKENS_AT_ONCE):
        for member, shares in zip(group, _shares(model, [rows[member][0] for member in group]), strict=True):
            ranked = sorted(zip(shares, labels, strict=True), key=lambda pair: -pair[0])
            probabilities = {label: share for share, label in ranked}
            ids, truncated = rows[member]
            found[places[member]] = Classification(ranked[0][1], probabilities, len(ids), truncated)
    return found


def _shares(model: CausalLM, rows: Sequence[list[int]]) -> list[list[float]]:
    """The probabilities of all labels for each row; the rows go through the model as one stream, rounded up by a last
    segment that nobody reads, as in training.
    """
    device = next(model.parameters()).device
    own = [len(ids) for ids in rows]
    missing = -sum(own) % ROUND_TO
    lengths = [*own, missing] if missing else own
    ids_T = torch.tensor([*(token for ids in rows for token in ids), *[0] * missing], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    hidden_TD = model(ids_T, positions_T, Packed(lengths))
    last_N = torch.tensor(own, device=device).cumsum(0) - 1
    return class_logits(model, hidden_TD[last_N]).softmax(-1).tolist()
