"""A Llama of random weights on disk, in the shape of a real one: to measure memory and speed where no weights are.

    python benchmarks/make_random_llama.py --shape 7b --output_dir DIR [--layers 4] [--seed 0]

Shard by shard, so that it takes little memory: a tensor is a pure function of the seed and its name. The folder appears
whole or not at all, in Hugging Face's layout, bfloat16, with a tokenizer of bytes: every command takes it. 7b is
LLaMA-7B (Touvron et al. 2023, table 2), 1b is TinyLlama-1.1B, tiny is for tests. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from rich.console import Console
from tokenizers.pre_tokenizers import ByteLevel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.device import peak_memory_bytes  # noqa: E402
from alpaca_lora.errors import AlpacaLoraError  # noqa: E402
from alpaca_lora.models.build import build_model  # noqa: E402
from alpaca_lora.models.config import ModelConfig  # noqa: E402
from alpaca_lora.models.rope import RopeConfig  # noqa: E402
from alpaca_lora.text.tokenizer import Tokenizer  # noqa: E402
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition, bos_post_processor, special  # noqa: E402
from alpaca_lora.weights.huggingface import write_folder  # noqa: E402

# layers, width, inner width, query heads, key heads, vocabulary
SHAPES = {
    "7b": (32, 4096, 11008, 32, 32, 32000),
    "1b": (22, 2048, 5632, 32, 4, 32000),
    "tiny": (2, 64, 176, 4, 2, 512),
}
CONTEXT = 2048
SPECIAL = ("<unk>", "<s>", "</s>")
SHARD_BYTES = 200_000_000  # what is held at a time, twice
PIECE = 2**22  # numbers drawn at a time, in float32


def config_of(shape: str, layers: int | None = None) -> ModelConfig:
    """The configuration; ``layers`` takes another number of the same layers."""
    num_layers, width, inner, heads, key_heads, vocabulary = SHAPES[shape]
    return ModelConfig(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_layers=layers or num_layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=width // heads, max_position_embeddings=CONTEXT, ropes=(RopeConfig(10_000.0),),
        extra={"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"},
    )  # fmt: skip


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight in bfloat16): norms one, all else normal with the standard deviation that keeps activations of
    size one, and what is added to the stream so small that its size does not grow with the layers.
    """
    for name, parameter in build_model(config, dtype=torch.bfloat16).named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * config.num_layers) ** -0.5
        yield name, normal(tuple(parameter.shape), std, seed, name)


def normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    """bfloat16, a pure function of the arguments."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for piece in weight.view(-1).split(PIECE):
        piece.copy_(torch.empty(piece.shape).normal_(std=std, generator=generator))
    return weight


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and three special ones before them."""
    letters = {letter: number + len(SPECIAL) for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = {word: number for number, word in enumerate(SPECIAL)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({**words, **letters}, [], unk_token=SPECIAL[0]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([special(word) for word in SPECIAL])
    unk, bos, eos = SPECIAL
    backend.post_processor = bos_post_processor(backend, bos)
    return Tokenizer(TokenizerDefinition(backend, "bytes", bos=bos, eos=eos, unk=unk, add_bos=True))


def make(
    folder: str | Path, shape: str, *, layers: int | None = None, seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the model to ``folder``, which must not hold anything. Returns its figures. ``on_progress``: name of a
    tensor, bytes made with it, bytes in all.
    """
    config, started = config_of(shape, layers), time.perf_counter()
    model = build_model(config, dtype=torch.bfloat16)
    total, done = 2 * model.num_parameters(), 0

    def told() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal done
        for name, tensor in random_tensors(config, seed):
            done += 2 * tensor.numel()
            on_progress(name, done, total)
            yield name, tensor

    path = write_folder(
        folder, told(), config.to_hf(), tokenizer_saver=byte_tokenizer().save, max_shard_bytes=SHARD_BYTES
    )
    return {
        "shape": shape, "layers": config.num_layers, "parameters": model.num_parameters(), "bytes": total, "seed": seed,
        "seconds": round(time.perf_counter() - started, 1), "peak_memory_bytes": peak_memory_bytes(),
        "output_dir": str(path),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="another number of layers of the same shape")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    console = Console(stderr=True)

    def show(name: str, done: int, total: int) -> None:
        console.print(f"{done / total:4.0%}  {done / 1e9:6.2f} of {total / 1e9:.2f} GB  {name}", highlight=False)

    try:
        result = make(asked.output_dir, asked.shape, layers=asked.layers, seed=asked.seed, on_progress=show)
    except AlpacaLoraError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
