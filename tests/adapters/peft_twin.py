"""The same steps and the same files on both sides: a PEFT model on transformers' Llama, and our adapter on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from alpaca_lora.adapters.peft_format import load_adapter, save_adapter
from alpaca_lora.models.attention import Packed
from tests.adapters.conftest import IDS, Twins
from tests.tiny import tiny_model

# the warning is about PEFT's own use of transformers, whatever the folder
PEFT_ON_TRANSFORMERS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def our_loss(model: Any) -> torch.Tensor:
    logits_TV = model.logits(model(IDS, torch.arange(len(IDS)), Packed([len(IDS)])))
    return F.cross_entropy(logits_TV[:-1], IDS[1:])


def their_loss(model: Any) -> torch.Tensor:
    return F.cross_entropy(model(input_ids=IDS[None]).logits[0, :-1].float(), IDS[1:])


def our_steps(model: Any, adapter: Any, steps: int = 3, learning_rate: float = 0.3) -> None:
    """Plain gradient descent on the tokens of `IDS`."""
    parameters = [parameter for _, parameter in adapter.trained_parameters()]
    for _ in range(steps):
        adapter.set_rows(None)
        _descend(our_loss(model), parameters, learning_rate)
    adapter.set_rows(None)


def their_steps(model: Any, steps: int = 3, learning_rate: float = 0.3) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(steps):
        _descend(their_loss(model), parameters, learning_rate)


def _descend(loss: torch.Tensor, parameters: list[torch.nn.Parameter], learning_rate: float) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=learning_rate)


def assert_peft_loads_ours(twins: Twins, adapter: Any, folder: Path) -> Any:
    """PEFT reads the folder without a word of warning and its logits are ours within 1e-5; returns its model."""
    from peft import PeftModel

    save_adapter(folder, adapter)
    model = PeftModel.from_pretrained(twins.theirs, str(folder))
    difference = (twins.their_logits(model) - twins.our_logits()).abs().max()
    assert difference < 1e-5, difference
    return model


def assert_we_load_peft_s(twins: Twins, theirs: Any, folder: Path) -> Any:
    """We read what PEFT saved, our logits are its own within 1e-5, and what we write of it is what PEFT wrote."""
    theirs.save_pretrained(str(folder / "theirs"), save_embedding_layers=False)
    adapter, _ = load_adapter(folder / "theirs", twins.ours)
    assert adapter.messages == [] and list(adapter.trained_parameters()) == []
    difference = (twins.their_logits(theirs.eval()) - twins.our_logits()).abs().max()
    assert difference < 1e-5, difference
    save_adapter(folder / "ours", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "theirs" / name).read_bytes() == (folder / "ours" / name).read_bytes()
    return adapter


def assert_merges_as_peft(twins: Twins, adapter: Any, theirs: Any) -> None:
    """Every weight of the merged models is the same within 1e-5, and the merge changed some."""
    merged = theirs.merge_and_unload()
    adapter.merge()
    wanted, before = merged.state_dict(), tiny_model().state_dict()
    changed = 0
    for name, weight in twins.ours.state_dict().items():
        assert (weight - wanted[name]).abs().max() < 1e-5, name
        changed += not torch.equal(weight, before[name]) if name in before else 0
    assert changed
