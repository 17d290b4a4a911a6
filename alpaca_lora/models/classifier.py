"""The classification head: `score`, a float32 linear (C, D) without bias on the hidden state of a text's last token.

Hugging Face's name and place for it, so that a ``...ForSequenceClassification`` folder and PEFT's SEQ_CLS adapters are
read and written without a table. Knows no data and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from alpaca_lora.errors import ConfigError, ModelFileError, UserError
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.linear import Linear

SCORE_WEIGHT = "score.weight"
INITIAL_STD = 0.02


class Score(Linear):
    """One row for each class; ``labels``: their names, in the order of the rows."""

    def __init__(self, in_features: int, labels: Sequence[str], *, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, len(labels), dtype=torch.float32, device=device)
        self.labels = tuple(labels)


def attach_score(model: CausalLM, labels: Sequence[str] | int, seed: int) -> Score:
    """Put a head for these labels (or for so many, without names) on the model, drawn from ``seed``; return it.

    A head that the base brought stays as it is, if its labels are the same or either has no names. ConfigError when
    they are others, ValueError for fewer than two.
    """
    names = default_labels(labels) if isinstance(labels, int) else tuple(labels)
    if len(names) < 2:
        raise ValueError(f"{len(names)} classes: at least 2")
    if (found := find_score(model)) is not None:
        if len(found.labels) == len(names) and (found.labels == names or unnamed(names) or unnamed(found.labels)):
            found.labels = found.labels if unnamed(names) else names
            return found
        raise ConfigError(
            f"the base model is a classifier with the labels {', '.join(map(repr, found.labels[:10]))}",
            field="base_model",
            expected=f"the labels of the data, {', '.join(map(repr, names[:10]))}, or a base without a head",
        )
    device = model.embeddings.weight.device
    score = Score(model.config.hidden_size, names, device=device)
    generator = torch.Generator().manual_seed(seed)
    score.weight.data.copy_(torch.randn(score.weight.shape, generator=generator) * INITIAL_STD)
    model.score = score
    return score


def find_score(model: nn.Module) -> Score | None:
    """The model's head, if it is a classifier; an adapter may stand before it."""
    score = getattr(model, "score", None)
    score = getattr(score, "base", score)
    return score if isinstance(score, Score) else None


def class_logits(model: CausalLM, hidden_ND: torch.Tensor) -> torch.Tensor:
    """float32 logits_NC of the hidden states given. UserError for a model without a head."""
    if (score := model.score) is None:
        raise UserError("the model is no classifier", fix="give an adapter or a model trained with task classification")
    return score(hidden_ND.float())


def refuse_classifier(model: CausalLM) -> None:
    """ConfigError when the base is a classifier: its file holds no head over tokens, so it cannot learn to answer."""
    if (score := find_score(model)) is not None:
        raise ConfigError(
            f"is a classifier of {len(score.labels)} classes, which writes no text",
            field="base_model",
            expected="a model with a head over tokens",
            fix="set task to classification, or give the model that it was made of",
        )


def default_labels(num_labels: int) -> tuple[str, ...]:
    """Names for labels without names, as Hugging Face has them."""
    return tuple(f"LABEL_{number}" for number in range(num_labels))


def unnamed(labels: Sequence[str]) -> bool:
    """Whether these are nothing but the numbers of the classes."""
    return tuple(labels) == default_labels(len(labels))


def read_labels(config: Mapping[str, Any], num_labels: int, *, file: str | PathLike[str]) -> tuple[str, ...]:
    """The names of a classifier's labels by the ``id2label`` of its config.json; numbered ones where it has none.

    ModelFileError when there are as many names as nobody can have for ``num_labels`` rows of the head.
    """
    table = config.get("id2label")
    if table is None:
        return default_labels(num_labels)
    wanted = [str(number) for number in range(num_labels)]
    named = isinstance(table, Mapping) and sorted(table) == sorted(wanted)
    if not named or not all(isinstance(table[number], str) for number in wanted):
        raise ModelFileError(
            f"is {str(table)[:100]}",
            file=file,
            field="id2label",
            expected=f"names for the numbers 0 to {num_labels - 1}",
        )
    return tuple(table[number] for number in wanted)


def classifier_config(config: Mapping[str, Any], labels: Sequence[str], pad_id: int | None) -> dict[str, Any]:
    """The keys of a causal model's config.json, as those of a classifier with these labels. ``pad_id``: `padding_id`
    of its tokenizer; None is written too, because transformers reads the last token then.
    """
    names = [str(name).replace("ForCausalLM", "ForSequenceClassification") for name in config["architectures"]]
    return {
        **config,
        "architectures": ["Gemma3TextForSequenceClassification" if "Gemma3" in name else name for name in names],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "pad_token_id": pad_id,
    }


def padding_id(special_tokens: Mapping[str, int], pad_id: int | None, classified_id: int | None) -> int | None:
    """The id that pads texts to classify. Transformers and PEFT classify the last token that is no padding, so it must
    not be ``classified_id``, the EOS that ends every text (None: texts end with their own last token). Where it is,
    the first of ``special_tokens`` (name -> id) that is not; None without one: then no texts can be padded.
    """
    if pad_id is None or pad_id != classified_id:
        return pad_id
    return next((index for index in special_tokens.values() if index != classified_id), None)


def expect_score(
    model: CausalLM, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], *, file: Any
) -> None:
    """Give an empty model the head that its weight file holds, and take away the head over tokens where it has none.

    The head is as wide as the model here; `models.load.check_tensors` compares it with the file.
    """
    shape = shapes.get(SCORE_WEIGHT)
    if shape is None:
        return
    if len(shape) != 2 or shape[0] < 2:
        raise ModelFileError(
            f"is {'x'.join(map(str, shape))}", file=file, field=SCORE_WEIGHT, expected="two rows or more, one per class"
        )
    labels = read_labels(config, shape[0], file=file)
    model.score = Score(model.config.hidden_size, labels, device=model.embeddings.weight.device)
    if "lm_head.weight" not in shapes:
        model.lm_head = None
