"""The same tiny Llama twice: transformers' and ours, with equal weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from tests.tiny import tiny_model

IDS = torch.randint(0, 264, (23,), generator=torch.Generator().manual_seed(7))


@dataclass
class Twins:
    """`theirs` is transformers' LlamaForCausalLM, `ours` the same model in our classes; both new for each test."""

    theirs: Any
    ours: CausalLM

    def our_logits(self, model: nn.Module | None = None) -> torch.Tensor:
        return our_logits(model or self.ours)

    def their_logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (model or self.theirs)(input_ids=IDS[None]).logits[0].float()


def our_logits(model: Any, ids_T: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids_T, torch.arange(len(ids_T)), Packed([len(ids_T)])))


def make_twins(**overrides: Any) -> Twins:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = tiny_model(**overrides)
    hf = {key: value for key, value in ours.config.to_hf().items() if key != "model_type"}
    theirs = LlamaForCausalLM(LlamaConfig(**hf, attn_implementation="eager"))
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    return Twins(theirs.eval(), ours)


@pytest.fixture
def twins() -> Twins:
    return make_twins()


@pytest.fixture
def options() -> Callable[..., Any]:
    """AdapterOptions with rank 4 on q and v and no dropout, unless said otherwise."""
    from alpaca_lora.adapters.options import AdapterOptions

    def make(**changes: Any) -> AdapterOptions:
        return AdapterOptions(**{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **changes})

    return make


def train_a_little(adapter: Any, seed: int = 3) -> None:
    """What training would leave: every parameter some way from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter.trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
