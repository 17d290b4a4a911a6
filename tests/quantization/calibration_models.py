"""Tiny models of three architectures as folders and loaded, and rows for them."""

from __future__ import annotations

from pathlib import Path

import torch

from alpaca_lora.device import Compute
from alpaca_lora.models.load import Base, load_base
from tests.models.hf_models import hf_model
from tests.tiny import VOCAB_SIZE, ByteTokenizer

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 1, "test")
ARCHITECTURES = ("llama2-grouped-query", "gemma3", "gpt-neo")


def save(name: str, folder: Path) -> Path:
    """A tiny random model of ``name`` in Hugging Face's layout."""
    hf_model(name, vocab_size=VOCAB_SIZE, intermediate_size=48).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def load(folder: Path) -> Base:
    """Dense, in float32."""
    return load_base(str(folder), FLOAT32)


def rows(num_rows: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Rows of several lengths, 29 to 34 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (29 + place % 6,), generator=generator) for place in range(num_rows)]
