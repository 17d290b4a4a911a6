"""Adapter folders of every kind for the tiny model, and what a model says with one: attached alone, or in a bank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alpaca_lora.adapters.adalora_config import pattern_of
from alpaca_lora.adapters.base import method_class
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import load_adapter, save_adapter, write_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.kernels.attention import KeysValues
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score
from alpaca_lora.models.decoder import CausalLM
from tests.adapters.conftest import train_a_little
from tests.tiny import VOCAB_SIZE, tiny_model

BASE = "fingerprint-of-the-tiny-base"
LABELS = ["red", "green", "blue"]
CLOSE: Mapping[str, float] = {"rtol": 1e-6, "atol": 1e-6}  # of an adapter alone in the forward
MakeModel = Callable[[], CausalLM]

KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"lora_r": 4},
    "lora-everywhere": {"lora_r": 3, "lora_target_modules": ["all-linear"]},
    "rslora": {"lora_r": 8, "use_rslora": True, "lora_target_modules": ["k_proj", "gate_proj"]},
    "patterns": {
        "lora_target_modules": [r".*\.(q|k|up)_proj"], "rank_pattern": ["q_proj=2", r"layers\.1\..*up_proj=6"],
        "alpha_pattern": [r"(layers.0)\..*=3", "k_proj=1"],
    },
    "one-layer": {"lora_target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "pissa": {"method": "pissa", "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]},
    "adalora": {"method": "adalora", "lora_r": 3, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"method": "dora", "lora_r": 4, "lora_target_modules": ["all-linear"]},
    "prefix": {"method": "prefix", "num_virtual_tokens": 3},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4},
}  # fmt: skip
SPECIAL: Sequence[str] = ("on-the-head", "pruned")  # those that no options make


def options(**changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"lora_dropout": 0.0, "lora_alpha": 8, **changes})


def record(**changes: Any) -> AdapterRecord:
    return AdapterRecord(**{"base_model": "tiny", "base_fingerprint": BASE, **changes})


def make_folder(
    folder: Path, kind: str = "lora", *, seed: int = 0, labels: Sequence[str] = (), model: CausalLM | None = None,
    note: AdapterRecord | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """A trained adapter of this kind, for the tiny model or another one, as `finetune` would save it."""
    if kind in SPECIAL:
        return make_pruned(folder, seed) if kind == "pruned" else make_on_the_head(folder, seed)
    chosen = options(**{**KINDS[kind], **changes})
    model = model or tiny_model()
    if labels:
        attach_score(model, labels, seed=seed)
    adapter = method_class(chosen.method).attach(model, chosen, seed=seed)
    train_a_little(adapter, seed)
    save_adapter(folder, adapter, note or record(labels=list(labels)))
    return folder


def make_on_the_head(folder: Path, seed: int = 0) -> Path:
    """A LoRA that is on the head too: PEFT trains such ones, we only read them."""
    adapter: Any = method_class("lora").attach(
        tiny_model(), options(lora_r=2, lora_target_modules=["down_proj"]), seed=0
    )
    train_a_little(adapter, seed)
    tensors = adapter.state_tensors()
    generator = torch.Generator().manual_seed(seed)
    for leaf, shape in (("lora_A", (2, 32)), ("lora_B", (VOCAB_SIZE, 2))):
        tensors[f"base_model.model.lm_head.{leaf}.weight"] = torch.randn(shape, generator=generator) * 0.2
    write_adapter(folder, tensors, {**adapter.config, "target_modules": ["down_proj", "lm_head"]}, record())
    return folder


def make_pruned(folder: Path, seed: int = 0) -> Path:
    """An AdaLoRA after its last pruning: modules of different ranks, one of them 0."""
    adapter: Any = method_class("adalora").attach(tiny_model(), options(**KINDS["adalora"]), seed=seed)
    train_a_little(adapter, seed)
    masks = {name: [at % (2 + place) != 0 for at in range(5)] for place, name in enumerate(adapter.layers)}
    masks[next(iter(masks))] = [False] * 5
    tensors = {}
    for key, tensor in adapter.state_tensors().items():
        name, _, leaf = key.removeprefix("base_model.model.").rpartition(".")
        kept = torch.tensor(masks[name])
        tensors[key] = (tensor[:, kept] if leaf == "lora_B" else tensor[kept]).contiguous()
    write_adapter(folder, tensors, {**adapter.config, "rank_pattern": pattern_of(masks)}, record())
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def make_bank(**more: Any) -> tuple[CausalLM, AdapterBank]:
    """The tiny model and its empty bank."""
    model = tiny_model()
    return model, AdapterBank(model, BASE, base_name="tiny", **more)


def is_untouched(model: CausalLM, bank: AdapterBank) -> bool:
    """Nothing of any load is left in the bank or on the model."""
    plain = [name for name, _ in tiny_model().named_modules()]
    return [name for name, _ in model.named_modules()] == plain and bank.names() == [] and bank.num_bytes == 0


def said_alone(
    folder: Path | None, prompts: Sequence[torch.Tensor], make_model: MakeModel = tiny_model
) -> list[torch.Tensor]:
    """Logits of each prompt with the adapter attached to a new model, unmerged, one prompt at a time."""
    model = make_model()
    if folder is not None:
        load_adapter(folder, model, BASE)
    with torch.inference_mode():
        return [model.logits(model(p, torch.arange(len(p)), Packed([len(p)]))) for p in prompts]


class ManyPrefixes:
    """A plan whose segments stand each behind a prefix of its own, as those of different adapters do in the cache."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[KeysValues] | None]]) -> None:
        self._lengths = [length for length, _ in segments]
        self._plans = [Packed([length], prefix) for length, prefix in segments]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
        parts = zip(self._plans, *(x.split(self._lengths) for x in (q, k, v)), strict=True)
        return torch.cat([plan.attend(layer, *qkv, *more) for plan, *qkv in parts])

    def with_prefix(self, prefix: object) -> Any:
        raise AssertionError("the model has no prefix of its own")


@torch.inference_mode()
def said_together(
    bank: AdapterBank, model: CausalLM, rows: Sequence[tuple[LoadedAdapter | None, torch.Tensor]]
) -> list[torch.Tensor]:
    """Logits of each prompt with its adapter, all in one forward."""
    lengths = [len(prompt) for _, prompt in rows]
    firsts = [0 if adapter is None else adapter.num_virtual for adapter, _ in rows]
    positions = torch.cat([first + torch.arange(n) for first, n in zip(firsts, lengths, strict=True)])
    prefixes = [None if adapter is None else adapter.prefix for adapter, _ in rows]
    plan = ManyPrefixes(list(zip(lengths, prefixes, strict=True)))
    bank.set_rows([(adapter, n) for (adapter, _), n in zip(rows, lengths, strict=True)])
    hidden = model(torch.cat([prompt for _, prompt in rows]), positions, plan)
    return list(model.logits(hidden).split(lengths))


def assert_same(found: torch.Tensor, expected: torch.Tensor, share: float = 32 * 2**-23) -> None:
    """Equal to ``share`` of the largest logit: a product of a stream of another length sums in another order, and a
    logit of two layers stands on some 32 steps that float32 rounds to 2^-23.
    """
    assert (found - expected).abs().max() <= share * expected.abs().max(), (found - expected).abs().max()
