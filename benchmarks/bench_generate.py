"""Our generation and transformers' `generate` beside each other: one process, the very same weights and prompts.

    python benchmarks/bench_generate.py [--base_model smollm2-135m] [--dtype bfloat16] [--threads 2] [--rounds 5]

Rounds alternate, so that a busy machine disturbs both alike; the median round counts. Greedy, end of text switched off,
so both make the same number of tokens. The last line is JSON: tokens per second and their ratio for one stream, for a
batch of 8, and for a prompt of 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca_lora.device import pick_compute
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Request, SamplingParams
from alpaca_lora.models.load import Base, load_base
from benchmarks.machine_card import keep


def as_transformers(base: Base) -> Any:
    """transformers' model over our weights (the very tensors), with its default attention (SDPA)."""
    hf = base.config.to_hf()
    config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=next(base.model.parameters()).dtype)
    missing, unexpected = model.load_state_dict(dict(base.model.named_parameters()), strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    # computed, not loaded: what was made on the meta device must be made again
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    return model.eval()


def prompts(base: Base, count: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Random but equal prompts of exactly `num_tokens`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(100, base.config.vocab_size, (count, num_tokens), generator=generator)
    return [tuple(row) for row in rows.tolist()]


def ours(engine: Engine, prompt_rows: list[tuple[int, ...]], num_new: int) -> list[tuple[int, ...]]:
    params = SamplingParams(max_new_tokens=num_new)
    return [completion.token_ids for completion in engine.generate([Request(ids, params) for ids in prompt_rows])]


def theirs(model: Any, prompt_rows: list[tuple[int, ...]], num_new: int) -> list[tuple[int, ...]]:
    ids = torch.tensor(prompt_rows)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


def race(
    run_ours: Callable[[], list[tuple[int, ...]]],
    run_theirs: Callable[[], list[tuple[int, ...]]],
    num_tokens: int,
    rounds: int,
) -> dict[str, float]:
    """Median tokens per second of both over alternating rounds, their ratio, and the share of equal tokens."""
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    said: dict[str, list[tuple[int, ...]]] = {}
    runs = {"ours": run_ours, "transformers": run_theirs}
    for place in range(rounds + 1):
        for name in sorted(runs, reverse=place % 2 == 1):
            start = time.perf_counter()
            said[name] = runs[name]()
            if place > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    speed = {name: num_tokens / statistics.median(times) for name, times in seconds.items()}
    best = {f"{name}_best": round(num_tokens / min(times), 1) for name, times in seconds.items()}
    pairs = [a == b for x, y in zip(said["ours"], said["transformers"], strict=True) for a, b in zip(x, y, strict=True)]
    ratio = round(speed["ours"] / speed["transformers"], 2)
    return {
        **{name: round(value, 1) for name, value in speed.items()}, **best, "ratio": ratio,
        "equal_tokens": round(sum(pairs) / len(pairs), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    args = parser.parse_args()
    compute = pick_compute("cpu", args.dtype, args.threads)
    base = load_base(args.base_model, compute)
    model = as_transformers(base)
    engine = Engine(base.model, base.tokenizer)
    races = {
        "single": (prompts(base, 1, 64), args.new_tokens, args.new_tokens),
        "batch_of_8": (prompts(base, 8, 64), args.new_tokens, 8 * args.new_tokens),
        "prompt_of_512": (prompts(base, 1, 512), 1, 512),
    }
    results = {}
    for name, (rows, num_new, num_tokens) in races.items():
        results[name] = race(
            lambda rows=rows, n=num_new: ours(engine, rows, n), lambda rows=rows, n=num_new: theirs(model, rows, n),
            num_tokens, args.rounds,
        )  # fmt: skip
        print(f"{name:>14}: {results[name]}", flush=True)
    card = {"dtype": compute.dtype_name, "threads": compute.num_threads, "torch": torch.__version__}
    print(keep("generate", {"model": base.name, **card, **results}))


if __name__ == "__main__":
    main()
