"""Virtual tokens on both sides: PEFT on transformers' models of several families and tasks, and ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score
from tests.adapters.conftest import IDS, Twins, make_twins
from tests.models.hf_models import hf_model, ours_from

# windows of 5 behind 5 virtual tokens; per-head norms; scaled embeddings; learned positions; rotation by length
FAMILIES = ["mistral", "qwen3", "gemma3", "gpt-neo", "rope-yarn", "qwen2-window"]
ROW = IDS % 97


class FamilyTwins(Twins):
    """Twins whose vocabulary has 97 words."""

    def our_logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return _logits(model or self.ours, ROW)

    def their_logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (model or self.theirs)(input_ids=ROW[None]).logits[0].float()


def family_twins(name: str) -> FamilyTwins:
    theirs = hf_model(name)
    return FamilyTwins(theirs, ours_from(theirs))


def _logits(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids_T, torch.arange(len(ids_T)), Packed([len(ids_T)])))


def assert_same_gradient(twins: Twins, adapter: Any, config: Any) -> None:
    """The same virtual tokens in PEFT's training get the gradient that ours do. (It trains no loaded ones.)"""
    from peft import get_peft_model

    model: Any = get_peft_model(twins.theirs, config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(adapter.state_tensors()["prompt_embeddings"])
    weights = torch.randn(len(IDS), 264, generator=torch.Generator().manual_seed(1))
    (model(input_ids=IDS[None]).logits[0, -len(IDS) :] * weights).sum().backward()
    theirs = model.prompt_encoder["default"].embedding.weight.grad
    ((_, parameter),) = adapter.trained_parameters()
    (ours,) = torch.autograd.grad((_logits(twins.ours, IDS) * weights).sum(), parameter)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def assert_classifiers_agree(attach: Callable[[Any], Any], folder: Path) -> None:
    """PEFT's SEQ_CLS form: the head beside the virtual tokens, under PEFT's name, in both directions."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import LlamaForSequenceClassification

    twins = make_twins()
    attach_score(twins.ours, 3, seed=0)
    head = twins.ours.score.weight.detach().clone()
    adapter = attach(twins.ours)
    assert adapter.config["task_type"] == "SEQ_CLS" and (twins.ours.score.weight - head).abs().max() > 0.1
    assert set(adapter.moved()) > {"score"} and "base_model.score.weight" in dict(adapter.trained_parameters())
    save_adapter(folder / "a", adapter)
    assert "base_model.score.weight" in load_file(folder / "a" / "adapter_model.safetensors")

    config = twins.theirs.config
    config.num_labels, config.pad_token_id = 3, None
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.model.load_state_dict(twins.theirs.model.state_dict())
    peft: Any = PeftModel.from_pretrained(theirs, str(folder / "a"))
    with torch.no_grad():
        wanted = peft(input_ids=IDS[None]).logits[0]
        hidden_TD = twins.ours(IDS, torch.arange(len(IDS)), Packed([len(IDS)]))
        assert (twins.ours.score(hidden_TD[-1]) - wanted).abs().max() < 1e-5

    peft.save_pretrained(str(folder / "b"), save_embedding_layers=False)
    other = make_twins().ours
    attach_score(other, 3, seed=1)
    loaded, _ = load_adapter(folder / "b", other)
    for key, tensor in adapter.state_tensors().items():
        assert torch.equal(loaded.state_tensors()[key], tensor), key
    adapter.remove()
    assert torch.equal(twins.ours.score.weight, head)
