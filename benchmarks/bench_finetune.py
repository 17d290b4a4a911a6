"""Our engine and peft + the transformers Trainer, side by side: the same 64 rows, the same number of optimizer steps.

    make bench        or        .venv/bin/python benchmarks/bench_finetune.py [--rows 64] [--steps 8]

The peer runs in an environment of its own (benchmarks/requirements-peer.txt, made on the first run) on token ids that
we hand it, so both train on the same tokens and labels. Figures: tokens that are not padding per second, from the end
of the first step to the end of the last; peak resident memory of each process, ours with its preflight; then one
judge, our float32 evaluation, reads all adapters and gives each one's loss on rows that nobody trained on. The last
line is JSON and is kept in benchmarks/results/finetune.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.adapters.peft_format import load_adapter  # noqa: E402
from alpaca_lora.data.loader import Loader  # noqa: E402
from alpaca_lora.data.options import DataOptions  # noqa: E402
from alpaca_lora.data.prepare import Prepared, prepare  # noqa: E402
from alpaca_lora.data.table import ExampleTable  # noqa: E402
from alpaca_lora.device import pick_compute  # noqa: E402
from alpaca_lora.models.load import Base, load_base, open_source  # noqa: E402
from alpaca_lora.text.templates import load_template  # noqa: E402
from alpaca_lora.training.loss import causal_lm_loss  # noqa: E402
from alpaca_lora.weights.huggingface import write_folder  # noqa: E402
from benchmarks.machine_card import keep  # noqa: E402

BASE, RANK, ALPHA, LEARNING_RATE, BATCH, CUTOFF = "smollm2-135m", 16, 16, 3e-4, 8, 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PEER = ROOT / ".venv-peer"
SEED = 42


def peer_python() -> Path:
    """The peer's interpreter; its environment is made where it is missing."""
    python = PEER / "bin/python"
    done = PEER / ".installed"
    wanted = ROOT / "benchmarks/requirements-peer.txt"
    if not done.exists() or done.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(wanted)], check=True)
        done.touch()
    return python


def sample_rows(data: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """Seeded samples of the file for training and validation, as alpaca files of their own."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(SEED)
    picked = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: 2 * count].tolist()]
    paths = folder / "train.json", folder / "val.json"
    for path, part in zip(paths, (picked[:count], picked[count:]), strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    return paths


def handed_over(table: ExampleTable) -> list[dict[str, list[int]]]:
    """Ids and labels of each row for the peer: -100 where nothing is learned."""
    return [
        {
            "ids": e.ids_T.tolist(),
            "labels": [int(i) if s else -100 for i, s in zip(e.ids_T, e.supervised_T, strict=True)],
        }
        for e in table
    ]


def dense_folder(base: Base, folder: Path) -> Path:
    """The base's weights as a float32 Hugging Face folder, which transformers loads: the same numbers for both."""
    source = open_source(base.path)
    try:
        tensors = ((name, source.read(name)) for name in source.shapes)
        write_folder(folder, tensors, {**base.config.to_hf(), "torch_dtype": "float32"})
    finally:
        source.close()
    return folder


def run_ours(folder: Path, train: Path, val: Path, steps: int, dropout: float) -> dict[str, Any]:
    """One run of the command, as a user would start it."""
    output = folder / f"ours-{dropout:g}"
    flags = {
        "base_model": BASE, "data_path": train, "val_data_path": val, "output_dir": output, "batch_size": BATCH,
        "micro_batch_size": 4, "max_steps": steps, "learning_rate": LEARNING_RATE, "warmup_steps": 0,
        "cutoff_len": CUTOFF, "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout,
        "lora_target_modules": ",".join(TARGETS), "prompt_template_name": "alpaca", "num_sample_answers": 0,
        "save_steps": 100_000,
    }  # fmt: skip
    command = [sys.executable, "-m", "alpaca_lora", "finetune", "--json"]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = [(line["tokens"], line["seconds"]) for line in log if "train_loss" in line]
    tokens, seconds = timed[-1][0] - timed[0][0], sum(s for _, s in timed[1:])
    return {
        "tokens_per_second": tokens / seconds, "peak_memory_bytes": result["peak_memory_bytes"],
        "seconds": sum(s for _, s in timed), "adapter": str(output),
    }  # fmt: skip


def run_peer(python: Path, folder: Path, model: Path, rows: Path, steps: int, recipe: str) -> dict[str, Any]:
    output = folder / f"peer-{recipe}"
    job = {
        "model": str(model), "rows": str(rows), "recipe": recipe, "output": str(output), "steps": steps,
        "batch_size": BATCH, "learning_rate": LEARNING_RATE, "rank": RANK, "alpha": ALPHA, "targets": TARGETS,
        "seed": SEED,
    }  # fmt: skip
    path = folder / f"job-{recipe}.json"
    path.write_text(json.dumps(job))
    command = [str(python), str(ROOT / "benchmarks/peer_trainer.py"), str(path)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "adapter": str(output)}


def validation_loss(adapter: str | None, prepared: Prepared) -> float:
    """The judge: mean loss per token in float32 on the validation rows, our code, whoever trained the adapter."""
    base = load_base(BASE, pick_compute("cpu", "float32"))
    if adapter is not None:
        load_adapter(adapter, base.model)
    assert prepared.val is not None
    loader = Loader(prepared.val, batch_size=BATCH, token_budget=4 * CUTOFF, seed=SEED)
    total = count = 0
    with torch.no_grad():
        for batch in loader.eval_batches():
            total += float(causal_lm_loss(base.model, batch, 1))
            count += batch.num_supervised
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/alpaca_data.json")
    asked = parser.parse_args()
    if not asked.data.exists():
        raise SystemExit(f"{asked.data} is missing: --data takes any file in the alpaca format")
    console, python = Console(stderr=True), peer_python()
    with tempfile.TemporaryDirectory(prefix="bench-finetune-") as name:
        folder = Path(name)
        train, val = sample_rows(asked.data, folder, asked.rows)
        base = load_base(BASE, pick_compute("cpu", "float32"))
        template = load_template("alpaca", base.tokenizer)
        options = DataOptions(data_path=[str(train)], val_data_path=[str(val)], cutoff_len=CUTOFF)
        prepared = prepare(options, base.tokenizer, template, seed=SEED)
        rows = folder / "rows.json"
        rows.write_text(json.dumps(handed_over(prepared.train)))
        model = dense_folder(base, folder / "model")
        del base
        runs: dict[str, dict[str, Any]] = {}
        for label, start in {
            "ours, dropout 0.05": lambda: run_ours(folder, train, val, asked.steps, 0.05),
            "peer, default (float32, dropout 0.05)": lambda: run_peer(
                python, folder, model, rows, asked.steps, "default"
            ),
            "peer, best (bfloat16, grouped, no dropout)": lambda: run_peer(
                python, folder, model, rows, asked.steps, "best"
            ),
            "ours, no dropout": lambda: run_ours(folder, train, val, asked.steps, 0.0),
        }.items():
            console.print(f"running: {label}")
            runs[label] = start()
            runs[label]["val_loss"] = validation_loss(runs[label].pop("adapter"), prepared)
            console.print(json.dumps(runs[label]), markup=False, soft_wrap=True)
        untrained = validation_loss(None, prepared)
    report(console, asked, runs, untrained)


def report(console: Console, asked: Any, runs: dict[str, dict[str, Any]], untrained: float) -> None:
    """The table for people, the line for the record."""
    table = Table(title=f"{asked.rows} Alpaca rows, {asked.steps} steps of {BATCH}, LoRA r {RANK} on q,k,v,o, {BASE}")
    for heading in ("run", "tokens/s", "peak memory", "validation loss"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for label, figures in runs.items():
        memory = f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(label, f"{figures['tokens_per_second']:.0f}", memory, f"{figures['val_loss']:.4f}")
    table.add_row("before training", "", "", f"{untrained:.4f}")
    console.print(table)
    ours, default, best, ours_plain = runs.values()
    ratios = {
        "speed_over_default": ours["tokens_per_second"] / default["tokens_per_second"],
        "speed_over_best": ours_plain["tokens_per_second"] / best["tokens_per_second"],
        "memory_share_of_default": ours["peak_memory_bytes"] / default["peak_memory_bytes"],
        "val_loss_minus_default": ours["val_loss"] - default["val_loss"],
        "val_loss_minus_best": ours_plain["val_loss"] - best["val_loss"],
        "dropout_costs": 1 - ours["tokens_per_second"] / ours_plain["tokens_per_second"],
    }
    result = {"rows": asked.rows, "steps": asked.steps, "runs": runs, "untrained_val_loss": untrained, "ratios": ratios}
    print(keep("finetune", result))


if __name__ == "__main__":
    main()
