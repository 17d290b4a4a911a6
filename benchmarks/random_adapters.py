"""LoRA adapters with random weights, saved as PEFT does: for measuring, where it does not matter what they learned."""

from __future__ import annotations

from pathlib import Path

import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.device import pick_compute
from alpaca_lora.models.load import load_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SPREAD = 0.02  # of the numbers: enough to change what the model says, not so much that it says nothing


def make_adapters(base_model: str, folder: Path, count: int, *, rank: int = 16) -> list[Path]:
    """Folders ``a0`` to ``a<count - 1>``, each with numbers of its own in A and B of q, k, v and o of every layer."""
    base = load_base(base_model, pick_compute("cpu", "bfloat16", 0))
    options = AdapterOptions.model_validate(
        {"lora_r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "lora_target_modules": TARGETS}
    )
    adapter = Lora.attach(base.model, options, seed=0)
    paths = [folder / f"a{number}" for number in range(count)]
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, parameter in adapter.trained_parameters():
                parameter.normal_(0.0, SPREAD, generator=generator)
        save_adapter(path, adapter)
    return paths
