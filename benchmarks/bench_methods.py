"""What each adaptation method costs per training step, ours and PEFT's: one process, the same weights and tokens.

    python benchmarks/bench_methods.py [--steps 20] [--rank 16] [--targets q_proj v_proj] [--contenders ours-lora ...]

Contenders take their steps in turn, in an order that rotates, so that a busy machine disturbs all alike; the first two
rounds warm up. A step is forward, backward, clipping, AdamW and what the method does besides (AdaLoRA: penalty and
allocation, in the phase where ranks fall). Rows have one length, so PEFT pays for no padding; no dropout. Figures:
the median step, and the overhead of each method over LoRA of the same side, rank and targets: the median of the
rounds' ratios. The last line is JSON and is kept in benchmarks/results/methods.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca_lora.adapters.base import method_class
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.data.examples import Batch, StepBatch, TokenizedExample
from alpaca_lora.device import pick_compute
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.training.loss import causal_lm_loss
from alpaca_lora.training.options import TrainingOptions
from alpaca_lora.training.trainer import Trainer
from benchmarks.bench_generate import as_transformers
from benchmarks.machine_card import keep

CONTENDERS = [
    *(f"ours-{method}" for method in ("lora", "dora", "adalora", "ia3", "pissa", "prefix")),
    *(f"peft-{method}" for method in ("lora", "dora", "adalora")),
]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3_TARGETS = ["k_proj", "v_proj", "down_proj"]
LEARNING_RATE = 1e-4
SCHEDULE = 100_000  # steps of the run that AdaLoRA plans for: ranks fall, and no direction is removed yet
WARM_UP = 2
Step = Callable[[], object]


class SameBatch:
    """The part of the loader that the trainer uses: one batch, over and over."""

    steps_per_epoch = SCHEDULE

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def step_batch(self, step: int) -> StepBatch:
        return StepBatch(step, 0, (self.batch,))


def sample_ids(base: Base, rows: int, tokens: int) -> torch.Tensor:
    """(rows, tokens) seeded ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, base.config.vocab_size, (rows, tokens), generator=generator)


def our_step(base: Base, method: str, ids_BT: torch.Tensor, rank: int, targets: list[str]) -> tuple[Step, int]:
    """(a step of the trainer itself, number of trained parameters); the frozen weights are the base's own tensors."""
    model = copy.deepcopy(base.model, {id(parameter): parameter for parameter in base.model.parameters()})
    chosen = {
        "method": method, "lora_r": rank // 2 if method == "adalora" else rank, "adalora_init_r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "lora_target_modules": IA3_TARGETS if method == "ia3" else targets,
        "adalora_tinit": 0, "virtual_tokens_text": "",
    }  # fmt: skip
    options = AdapterOptions.model_validate(chosen)
    adapter = method_class(method).attach(model, options, seed=0)
    supervised_T = torch.arange(ids_BT.shape[1]).numpy() >= ids_BT.shape[1] // 2
    rows = [TokenizedExample(row.int().numpy(), supervised_T, index) for index, row in enumerate(ids_BT)]
    training = TrainingOptions.model_validate(
        {"max_steps": SCHEDULE, "learning_rate": LEARNING_RATE, "warmup_steps": 0}
    )
    trainer = Trainer(model, adapter, SameBatch(Batch.pack(rows)), causal_lm_loss, training)
    return trainer.train_step, sum(parameter.numel() for _, parameter in adapter.trained_parameters())


def peer_step(base: Base, method: str, ids_BT: torch.Tensor, rank: int, targets: list[str]) -> tuple[Step, int]:
    """PEFT on transformers' model over the same tensors; its optimizer and clipping are those of the Trainer."""
    shared = {"target_modules": targets, "lora_alpha": rank, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    if method == "adalora":
        config: LoraConfig = AdaLoraConfig(init_r=rank, target_r=rank // 2, total_step=SCHEDULE, tfinal=100, **shared)
    else:
        config = LoraConfig(r=rank, use_dora=method == "dora", **shared)
    model = get_peft_model(as_transformers(base), config).train()
    model.config.use_cache = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    labels_BT = ids_BT.clone()
    labels_BT[:, : ids_BT.shape[1] // 2] = -100
    taken = [0]

    def step() -> None:
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        taken[0] += 1
        if method == "adalora":
            model.base_model.update_and_allocate(taken[0])  # pyright: ignore[reportCallIssue]
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def race(steps: dict[str, Step], rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of each contender's steps, round by round; each round begins with another of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for place in range(WARM_UP + rounds):
        for i in range(len(names)):
            name = names[(place + i) % len(names)]
            start = time.perf_counter()
            steps[name]()
            if place >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
        say(f"round {place + 1} of {WARM_UP + rounds}")
    return seconds


def summary(seconds: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Of each contender: median seconds, trained parameters, overhead over its own side's LoRA in percent."""
    found: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        own = seconds[f"{name.partition('-')[0]}-lora"]
        ratio = statistics.median(mine / lora for mine, lora in zip(times, own, strict=True))
        found[name] = {
            "seconds_per_step": round(statistics.median(times), 4), "trained_parameters": sizes[name],
            "overhead_percent": round(100 * (ratio - 1), 1),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row_tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=ALL_LINEAR)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    asked = parser.parse_args()
    console = Console(stderr=True)
    compute = pick_compute("cpu", asked.dtype, asked.threads)
    base = load_base(asked.base_model, compute)
    ids_BT = sample_ids(base, asked.rows, asked.row_tokens)
    steps: dict[str, Step] = {}
    sizes: dict[str, int] = {}
    sides = {name.partition("-")[0] for name in asked.contenders}
    for name in CONTENDERS:
        side, _, method = name.partition("-")
        # each side's LoRA is what its others are measured by
        if name in asked.contenders or (method == "lora" and side in sides):
            console.print(f"making: {name}")
            make = our_step if side == "ours" else peer_step
            steps[name], sizes[name] = make(base, method, ids_BT, asked.rank, asked.targets)
    results = summary(race(steps, asked.steps, console.print), sizes)
    table = Table(
        title=f"{asked.rows} rows of {asked.row_tokens} tokens, rank {asked.rank}, {base.name} in {compute.dtype_name}"
    )
    for heading in ("method", "trained", "seconds per step", "over LoRA"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['trained_parameters']:,}",
            f"{row['seconds_per_step']:.3f}",
            f"{row['overhead_percent']:+.1f} %",
        )
    console.print(table)
    card = {
        "model": base.name, "dtype": compute.dtype_name, "threads": compute.num_threads, "steps": asked.steps,
        "rows": asked.rows, "row_tokens": asked.row_tokens, "rank": asked.rank, "targets": asked.targets,
    }  # fmt: skip
    print(keep("methods", {**card, "methods": results}))


if __name__ == "__main__":
    main()
