"""Runs that train the model's own weights: they learn, resume bit for bit, and touch nothing that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.training.checkpoint import verify
from alpaca_lora.training.trainer import Trainer
from tests.adapters.conftest import our_logits
from tests.tiny import tiny_model
from tests.training.tiny_run import TinyBatches, digest, gradient, log_of, table, tiny_trainer

METHODS: dict[str, dict[str, Any]] = {
    "freeze": {"method": "freeze", "train_last_layers": 1},
    "head": {"method": "freeze", "train_last_layers": 0},
    "embedding": {"method": "freeze", "trained_modules": ["embed_tokens"]},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full"},
    "lora and modules": {"method": "lora", "modules_to_save": ["embed_tokens", "norm"]},
}
TIED = {"embedding", "full", "lora and modules"}  # both ways of a tied matrix are in the loss


def model_of(name: str, dtype: torch.dtype) -> CausalLM:
    return tiny_model(tie_word_embeddings=name in TIED).to(dtype)


def trainer_of(name: str, dtype: torch.dtype, folder: Path | None = None, **more: Any) -> Trainer:
    # as a run would have it: bitfit moves little, whole layers and the tied matrix learn fast
    rate = 0.05 if name == "bitfit" else 0.01
    return tiny_trainer(
        folder, model=model_of(name, dtype), adapter=METHODS[name], **{"learning_rate": rate, "save_steps": 3, **more}
    )


def weights(model: CausalLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_learns_resumes_and_freezes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    before = weights(model_of(name, dtype))
    whole = trainer_of(name, dtype, tmp_path / "whole", validation=False)
    whole.val_loader = TinyBatches(table())
    start, _ = whole.evaluate()
    whole.val_loader = None
    whole.train()
    whole.val_loader = TinyBatches(table())
    assert whole.evaluate()[0] < start - 0.1

    trained = {id(p) for _, p in whole.adapter.trained_parameters()}
    after = dict(whole.model.named_parameters())
    frozen = {n for n, p in after.items() if id(p) not in trained}
    assert all(torch.equal(after[n].detach(), before[n.replace(".base.", ".")]) for n in frozen)
    assert all(after[n].grad is None for n in frozen)
    assert set(whole.adapter.moved()) and all(whole.adapter.moved().values())
    for key, parameter in whole.optimizer.named_parameters():
        master = whole.optimizer.state_tensors()[f"weight.{key}"]
        assert torch.equal(parameter.detach(), master.to(parameter.dtype))
        assert dtype == torch.float32 or parameter.dtype == dtype or any(w in key for w in ("norm", "lora"))

    rest = trainer_of(
        name, dtype, tmp_path / "rest", validation=False, resume=verify(tmp_path / "whole" / "checkpoint-3")
    )
    rest.train()
    assert digest(rest) == digest(whole) and log_of(rest) == log_of(whole)
    assert all(torch.equal(p, after[n]) for n, p in rest.model.named_parameters())

    served = model_of(name, dtype)
    load_adapter(tmp_path / "whole" / "checkpoint-6", served)
    assert torch.equal(our_logits(served), our_logits(whole.model))


@pytest.mark.parametrize("name", ["freeze", "bitfit", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cut_of_a_batch_does_not_change_its_gradient(name: str, checkpointing: bool) -> None:
    def of(size: int, dtype: torch.dtype) -> torch.Tensor:
        cut = {"micro_batch_size": size}
        return gradient(trainer_of(name, dtype, batches=cut, gradient_checkpointing=checkpointing))

    whole, pieces = of(4, torch.float32), of(1, torch.float32)
    assert (whole - pieces).abs().max() <= 1e-6 * whole.abs().max().clamp_min(1)
    # bfloat16 rounds each micro-batch's gradient once, and the sum of them not at all
    whole, pieces = of(4, torch.bfloat16), of(1, torch.bfloat16)
    assert (whole - pieces).norm() <= 8 * torch.finfo(torch.bfloat16).eps * whole.norm()


def test_the_state_holds_nothing_of_what_is_frozen() -> None:
    trainer = trainer_of("freeze", torch.bfloat16)
    model = trainer.model
    count = sum(p.numel() for p in model.layers[1].parameters()) + 32
    assert sum(tensor.numel() for tensor in trainer.optimizer.state_tensors().values()) == 3 * count
    gradient(trainer)
    assert all(p.grad is None for p in model.parameters() if p.dtype == torch.bfloat16)
