"""One contender of bench_quantization.py, in a process of its own: loads, measures, prints one JSON line.

.venv/bin/python benchmarks/quantization_worker.py --name nf4 --folder FOLDER_OR_MODEL [--tokens 65536]
.venv/bin/python benchmarks/quantization_worker.py --export FOLDER --folder MODEL     (the dense weights as bfloat16)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.device import peak_memory_bytes, pick_compute  # noqa: E402
from alpaca_lora.inference.engine import Engine  # noqa: E402
from alpaca_lora.inference.request import Request, SamplingParams  # noqa: E402
from alpaca_lora.models.attention import Packed  # noqa: E402
from alpaca_lora.models.linear import Linear, PackedLinear  # noqa: E402
from alpaca_lora.quantization.load import load_base  # noqa: E402
from alpaca_lora.text.rendered import Rendered, Span  # noqa: E402
from alpaca_lora.weights.huggingface import write_folder  # noqa: E402

TEST_FILE = ROOT.parent / "shared/data/wikitext2/test.txt"
WINDOW = 1024
CHUNK = 256  # rows of logits at a time
PREFILL, NEW_TOKENS, ROUNDS = 512, 48, 5
LogProbs = Callable[
    [torch.Tensor], torch.Tensor
]  # ids (T,) of one window -> log p of each token but the first (T - 1,)
Generate = Callable[[list[int], int], object]  # prompt, number of new tokens


def windows(ids: list[int], tokens: int) -> list[torch.Tensor]:
    """The text's tokens in whole windows."""
    ids = ids[: tokens or None]
    return [torch.tensor(ids[i : i + WINDOW]) for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def perplexity(log_probs: LogProbs, rows: list[torch.Tensor]) -> float:
    """exp of the mean of -log p, in float64."""
    total = sum(float(log_probs(row).double().sum()) for row in rows)
    return math.exp(-total / sum(len(row) - 1 for row in rows))


def picked(logits_NV: torch.Tensor, next_N: torch.Tensor) -> torch.Tensor:
    """log p (N,) of the token that came next."""
    logits_NV = logits_NV.float()
    return logits_NV.gather(1, next_N[:, None]).squeeze(1) - logits_NV.logsumexp(1)


def speed(generate: Generate, vocab_size: int) -> dict[str, float]:
    """Median tokens per second of a prompt of 512 tokens, and of single tokens after 64."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, vocab_size, (PREFILL,), generator=generator).tolist()
    generate(prompt[:64], 4)
    seconds: dict[str, list[float]] = {"prefill": [], "one": [], "many": []}
    for _ in range(ROUNDS):
        for name, ids, new in (("prefill", prompt, 1), ("one", prompt[:64], 1), ("many", prompt[:64], NEW_TOKENS + 1)):
            started = time.perf_counter()
            generate(ids, new)
            seconds[name].append(time.perf_counter() - started)
    decode = statistics.median(many - one for many, one in zip(seconds["many"], seconds["one"], strict=True))
    return {
        "prefill": round(PREFILL / statistics.median(seconds["prefill"]), 1), "decode": round(NEW_TOKENS / decode, 1)
    }  # fmt: skip


def linear_bits(model: torch.nn.Module) -> float:
    """Stored bits of each weight of the decoder's linears, scales and all."""
    linears = [m for n, m in model.named_modules() if isinstance(m, Linear | PackedLinear) and "lm_head" not in n]
    stored = sum(t.numel() * t.element_size() for m in linears for t in (*m.parameters(), *m.buffers()))
    return 8 * stored / sum(m.in_features * m.out_features for m in linears)


def ours(folder: str, tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    base = load_base(folder, pick_compute("cpu", "bfloat16", 0))
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 2)}
    model = base.model
    found["weight_bytes"] = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    found["linear_bits"] = round(linear_bits(model), 3)

    def log_probs(row: torch.Tensor) -> torch.Tensor:
        hidden = model(row, torch.arange(len(row)), Packed([len(row)]))
        parts = [
            picked(model.logits(hidden[i : i + CHUNK]), row[i + 1 : i + 1 + CHUNK])
            for i in range(0, len(row) - 1, CHUNK)
            if (hidden := hidden[: len(row) - 1]) is not None
        ]
        return torch.cat(parts)

    text = TEST_FILE.read_text(encoding="utf-8")
    ids = list(base.tokenizer.encode(Rendered(text, (Span(0, len(text)),), (), False, True)).ids)
    engine = Engine(model, base.tokenizer)
    with torch.inference_mode():
        found["perplexity"] = perplexity(log_probs, windows(ids, tokens))
        found |= speed(
            lambda prompt, new: list(engine.generate([Request(tuple(prompt), SamplingParams(max_new_tokens=new))])),
            base.config.vocab_size,
        )
    return found


def peer(name: str, folder: str, tokens: int) -> dict[str, Any]:
    import transformers

    started = time.perf_counter()
    model = load_peer(name, folder, transformers)
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 2)}
    found |= peer_bytes(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEST_FILE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]

    def log_probs(row: torch.Tensor) -> torch.Tensor:
        return picked(model(row[None]).logits[0, :-1], row[1:])

    def generate(prompt: list[int], new: int) -> object:
        batch = torch.tensor([prompt])
        return model.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    with torch.inference_mode():
        found["perplexity"] = perplexity(log_probs, windows(ids, tokens))
        found |= speed(generate, model.config.vocab_size)
    return found


def load_peer(name: str, folder: str, transformers: Any) -> Any:
    """transformers' model over the dense folder, quantized as the contender's name says."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
    if name == "bitsandbytes nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    elif name == "bitsandbytes int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if name.startswith("torchao"):
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # what it has for processors
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        def is_body(module: torch.nn.Module, path: str) -> bool:
            return isinstance(module, torch.nn.Linear) and "lm_head" not in path

        config = Int8WeightOnlyConfig() if name.endswith("int8") else PrototypeInt4WeightOnlyConfig(group_size=64)
        quantize_(model, config, filter_fn=is_body)
    return model


def peer_bytes(model: Any) -> dict[str, Any]:
    """Bytes of all tensors, quantization states too, and bits of each linear's weight."""

    def size(tensor: Any) -> int:
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:
            return sum(size(getattr(tensor, name)) for name in inner()[0])
        state, extra = getattr(tensor, "quant_state", None), 0
        for one in (state, getattr(state, "state2", None)):
            if one is not None:
                extra += one.absmax.numel() * one.absmax.element_size()
        if (scales := getattr(tensor, "SCB", None)) is not None:
            extra += scales.numel() * scales.element_size()
        return tensor.numel() * tensor.element_size() + extra

    total = sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    weights = sum(m.in_features * m.out_features for m in linears)
    return {"weight_bytes": total, "linear_bits": round(8 * sum(size(m.weight) for m in linears) / weights, 3)}


def export(model: str, folder: str) -> None:
    """The dense weights as a bfloat16 folder that transformers reads."""
    base = load_base(model, pick_compute("cpu", "bfloat16", 0))
    write_folder(
        folder, ((name, parameter.detach()) for name, parameter in base.model.named_parameters()),
        {**base.config.to_hf(), "torch_dtype": "bfloat16"}, tokenizer_saver=base.tokenizer.save,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--export")
    asked = parser.parse_args()
    if asked.export:
        export(asked.folder, asked.export)
        print(json.dumps({"folder": asked.export}))
        return
    warnings.simplefilter("ignore")  # of the peers' imports
    is_peer = asked.name.split()[0] in ("transformers", "bitsandbytes", "torchao")
    found = peer(asked.name, asked.folder, asked.tokens) if is_peer else ours(asked.folder, asked.tokens)
    print(json.dumps({**found, "peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main()
