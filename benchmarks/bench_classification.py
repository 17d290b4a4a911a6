"""Sentiment of SST-2 with each method: accuracy, trained parameters, time and memory, in one table.

    .venv/bin/python benchmarks/bench_classification.py [--methods lora dora ...] [--set num_epochs=1 ...]

Each row is `alpaca-lora finetune --config configs/classify.yml` in a process of its own, one after the other. Prints a
Markdown table; each run is a line of benchmarks/results/classification.jsonl, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.commands.schemas import METHOD_DEFAULTS  # noqa: E402
from benchmarks.machine_card import keep  # noqa: E402

RUNS: dict[str, list[str]] = {
    "lora": [],
    "adalora": ["--method", "adalora", "--learning_rate", "2e-3"],
    "dora": ["--method", "dora"],
    "prefix": ["--method", "prefix", "--learning_rate", "1e-2"],
    "freeze, last 2 layers": ["--method", "freeze", "--learning_rate", "1e-4"],
    "head only": ["--method", "freeze", "--train_last_layers", "0", "--learning_rate", "1e-2"],
    "pissa": ["--method", "pissa"],
    "ia3": ["--method", "ia3", "--lora_target_modules", "k_proj,v_proj,down_proj"],
    "prompt": ["--method", "prompt"],
    "bitfit": ["--method", "bitfit"],
    "full": ["--method", "full"],
}
# the rate of the file is LoRA's; where nothing is said, a fifth of the method's default, as LoRA's is of its own
RATES = {method: ["--learning_rate", str(keys["learning_rate"] / 5)] for method, keys in METHOD_DEFAULTS.items()}
SHOWN = ("accuracy", "macro_f1", "matthews", "trained_parameters", "seconds", "peak_memory_bytes", "tokens_per_second")


def flags(name: str) -> list[str]:
    """Those of the run, with its method's own learning rate unless they say one."""
    own = RUNS[name]
    return own if "--learning_rate" in own or "--method" not in own else [*own, *RATES.get(own[1], [])]


def run(name: str, changes: list[str]) -> dict[str, Any]:
    """One run in a folder that is thrown away; its figures."""
    with tempfile.TemporaryDirectory(prefix="bench-classification-") as folder:
        command = [
            sys.executable, "-m", "alpaca_lora", "finetune", "--config", "configs/classify.yml", "--json",
            "--output_dir", str(Path(folder) / "run"), *flags(name), *changes,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=os.environ.copy(), check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
    return {
        "run": name, "changes": [*flags(name), *changes], "wall_seconds": round(time.perf_counter() - started, 1),
        **{key: result[key] for key in SHOWN}, "steps": result["steps"], "best_val_loss": result["best_val_loss"],
        "report": {key: value for key, value in result["method_report"].items() if not isinstance(value, dict)},
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | accuracy | macro-F1 | Matthews | trained parameters | time | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        minutes, seconds = divmod(round(one["wall_seconds"]), 60)
        lines.append(
            f"| {one['run']} | {one['accuracy']:.1%} | {one['macro_f1']:.3f} | {one['matthews']:.3f} | "
            f"{one['trained_parameters']:,} | {minutes} min {seconds:02} s | "
            f"{one['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS)[:6])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all of them, e.g. num_epochs=1")
    arguments = parser.parse_args()
    changes = [word for pair in arguments.set for word in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]
    results = []
    for name in arguments.methods:
        results.append(run(name, changes))
        keep("classification", results[-1])
        print(table(results), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
