"""The classification head: Hugging Face's, in logits, names and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alpaca_lora.device import Compute, pick_compute
from alpaca_lora.errors import ConfigError, ModelFileError
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import (
    attach_score,
    class_logits,
    classifier_config,
    find_score,
    padding_id,
    read_labels,
    refuse_classifier,
)
from alpaca_lora.models.config import ModelConfig
from alpaca_lora.models.load import load_base
from tests.models.hf_models import MODELS
from tests.tiny import VOCAB_SIZE, ByteTokenizer, tiny_config, tiny_model

FAMILIES = ["llama2-grouped-query", "llama-multi-query-tied", "mistral", "qwen2", "qwen3", "gemma3", "gpt-neo"]
LABELS = ("bad", "good", "so so")


@pytest.fixture(scope="module")
def compute() -> Compute:
    return pick_compute("cpu", "float32")


def hf_classifier(name: str) -> transformers.PreTrainedModel:
    """A random float32 classifier of transformers."""
    keys: dict[str, Any] = {**MODELS[name], "vocab_size": VOCAB_SIZE, "id2label": dict(enumerate(LABELS))}
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, compute: Compute, name: str) -> None:
    theirs = hf_classifier(name)
    base = load_base(str(save(theirs, tmp_path / "model")), compute)
    score = find_score(base.model)
    assert score is not None and score.labels == LABELS and score.weight.dtype == torch.float32
    assert "a classifier of 3 classes" in base.description
    texts = [torch.tensor([5, 9, 200, 31, 7]), torch.tensor([1]), torch.arange(30, 47)]
    with torch.no_grad():
        expected = torch.cat([theirs(ids[None]).logits for ids in texts])
        lengths = [len(ids) for ids in texts]
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        hidden_TD = base.model(torch.cat(texts), positions_T, Packed(lengths))
        found = class_logits(base.model, hidden_TD[torch.tensor(lengths).cumsum(0) - 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.05  # not all alike


def test_the_head_of_a_bfloat16_base_is_float32(tmp_path: Path) -> None:
    folder = save(hf_classifier(FAMILIES[0]), tmp_path / "model")
    base = load_base(str(folder), pick_compute("cpu", "float32"), dtype=torch.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16, torch.float32}
    assert base.model.score is not None and base.model.score.weight.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_is_one_that_transformers_reads(name: str) -> None:
    keys = MODELS[name]
    ours = ModelConfig.from_hf(transformers.AutoConfig.for_model(**keys).to_dict()).to_hf()
    written = classifier_config(ours, LABELS, 258)
    (architecture,) = written["architectures"]
    model_class = getattr(transformers, architecture)
    assert architecture.endswith("ForSequenceClassification")
    read = model_class.config_class(**{key: value for key, value in written.items() if key != "model_type"})
    assert read.id2label == dict(enumerate(LABELS)) and read.num_labels == 3 and read.label2id["good"] == 1
    assert read.pad_token_id == 258
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(ours)


def test_a_new_head_is_drawn_from_its_seed() -> None:
    heads = [attach_score(tiny_model(), ("no", "yes"), seed).weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (2, 32) and heads[0].dtype == torch.float32 and not heads[0].requires_grad
    wide = attach_score(tiny_model(hidden_size=256, head_dim=64), 40, 0).weight
    assert float(wide.std()) == pytest.approx(0.02, rel=0.05) and abs(float(wide.mean())) < 1e-3
    with pytest.raises(ValueError, match="1 classes: at least 2"):
        attach_score(tiny_model(), ("one",), 0)


def test_a_head_that_is_there_stays_if_it_fits() -> None:
    model = tiny_model()
    before = attach_score(model, 2, seed=1)
    weight = before.weight.clone()
    assert attach_score(model, ("no", "yes"), seed=2) is before and before.labels == ("no", "yes")
    assert attach_score(model, 2, seed=2).labels == ("no", "yes") and torch.equal(before.weight, weight)
    for other in (("yes", "no"), ("a", "b", "c"), 3):
        with pytest.raises(ConfigError, match="the base model is a classifier with the labels 'no', 'yes'"):
            attach_score(model, other, seed=1)


def test_names_of_labels_are_read_or_numbered() -> None:
    assert read_labels({}, 2, file="f") == ("LABEL_0", "LABEL_1")
    assert read_labels({"id2label": {"1": "b", "0": "a"}}, 2, file="f") == ("a", "b")
    wrong: list[Any] = [{"0": "a"}, {"0": "a", "2": "b"}, ["a", "b"], {"0": "a", "1": 7}]
    for table in wrong:
        with pytest.raises(ModelFileError, match=r"f: id2label: is .*names for the numbers 0 to 1"):
            read_labels({"id2label": table}, 2, file="f")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 31), "score.weight is 2x31, expected 2x32"), ((2, 2, 32), "score.weight: is 2x2x32"), ((1, 32), "is 1x32")],
)
def test_a_head_of_another_shape_is_refused(
    tmp_path: Path, compute: Compute, shape: tuple[int, ...], message: str
) -> None:
    folder = save(hf_classifier(FAMILIES[0]), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(shape)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("id2label"), config.pop("label2id")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=message):
        load_base(str(folder), compute)


def test_a_causal_model_is_no_classifier() -> None:
    assert find_score(tiny_model()) is None and tiny_config().to_hf()["architectures"] == ["LlamaForCausalLM"]


def test_a_classifier_cannot_learn_to_answer() -> None:
    model = tiny_model()
    refuse_classifier(model)
    attach_score(model, LABELS, seed=0)
    with pytest.raises(ConfigError, match="base_model: is a classifier of 3 classes, which writes no text"):
        refuse_classifier(model)


@pytest.mark.parametrize(
    ("pad_id", "classified_id", "expected"),
    [(2, None, 2), (None, 2, None), (5, 2, 5), (2, 2, 0), (0, 0, 1), (None, None, None)],
)
def test_padding_is_never_the_token_that_is_classified(
    pad_id: int | None, classified_id: int | None, expected: int | None
) -> None:
    assert padding_id({"<unk>": 0, "<s>": 1, "</s>": 2}, pad_id, classified_id) == expected
    assert padding_id({"</s>": 2}, 2, 2) is None  # no other token is there: nothing can be padded
