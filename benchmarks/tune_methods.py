"""Which learning rate and rank each method wants: short runs on rows of Alpaca, judged by the validation loss.

    .venv/bin/python benchmarks/tune_methods.py [--methods lora dora ...] [--rates 3e-4 1e-3] [--steps 24] [--jobs 2]

The same rows, steps and batches for all. Runs that benchmarks/results/tuning.jsonl holds already (same settings) are
not made again, so it can be stopped and goes on. --jobs runs stand side by side, one thread each; their losses are
what counts, their speed says little. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine_card import RESULTS, keep  # noqa: E402

# method -> (flags, learning rates to try); rates a factor of about three apart around what its authors use
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "lora": ([], ["3e-4", "1e-3", "3e-3", "1e-2"]),
    "lora r=32": (["--lora_r", "32", "--lora_alpha", "64"], ["3e-4", "1e-3"]),
    "rslora r=32": (["--lora_r", "32", "--lora_alpha", "16", "--use_rslora"], ["3e-4", "1e-3"]),
    "lora+": (["--lora_plus_ratio", "16"], ["1e-4", "3e-4", "1e-3"]),
    "dora": (["--method", "dora"], ["3e-4", "1e-3", "3e-3", "1e-2"]),
    "pissa": (["--method", "pissa"], ["1e-4", "3e-4", "1e-3", "3e-3"]),
    "adalora": (["--method", "adalora"], ["1e-3", "3e-3", "1e-2", "3e-2"]),
    "ia3": (["--method", "ia3"], ["3e-3", "1e-2", "3e-2"]),
    "prefix": (["--method", "prefix"], ["3e-3", "1e-2", "3e-2", "1e-1"]),
    "prefix, random start": (["--method", "prefix", "--virtual_tokens_text", ""], ["1e-2"]),
    "prompt": (["--method", "prompt"], ["3e-3", "1e-2", "3e-2"]),
    "freeze": (["--method", "freeze"], ["3e-5", "1e-4", "3e-4", "1e-3"]),
    "bitfit": (["--method", "bitfit"], ["1e-3", "3e-3", "1e-2"]),
    "full": (["--method", "full"], ["1e-5", "3e-5", "1e-4", "3e-4"]),
}
BASE = (
    "--base_model smollm2-135m --prompt_template_name alpaca --train_on_inputs false --batch_size 16 --cutoff_len 256"
)
LORA = (
    ("lora_r", "8"),
    ("lora_alpha", "16"),
    ("lora_target_modules", "q_proj,k_proj,v_proj,o_proj"),
    ("lora_dropout", "0"),
)


def rows_file(folder: Path, data: Path, train: int, val: int) -> tuple[Path, Path]:
    """The first rows of the data, evenly taken, that train and those that validate."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    if len(rows) < train + val:
        sys.exit(f"{data}: {len(rows)} rows, {train + val} are needed")
    chosen = rows[:: len(rows) // (train + val)][: train + val]
    paths = folder / "train.json", folder / "val.json"
    paths[0].write_text(json.dumps(chosen[val:]), encoding="utf-8")
    paths[1].write_text(json.dumps(chosen[:val]), encoding="utf-8")
    return paths


def run(
    flags: list[str], rate: str, steps: int, files: tuple[Path, Path], folder: Path, threads: int
) -> dict[str, Any]:
    """One run; its figures."""
    own = flags[1::2] if "--method" in flags else []
    defaults = [] if own and own[0] not in ("dora", "pissa", "adalora") else [
        word for key, value in LORA if f"--{key}" not in flags for word in (f"--{key}", value)
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "alpaca_lora", "finetune", *BASE.split(), *defaults, *flags, "--json",
        "--data_path", str(files[0]), "--val_data_path", str(files[1]), "--max_steps", str(steps),
        "--eval_steps", str(steps), "--save_steps", "100000", "--learning_rate", rate, "--num_sample_answers", "0",
        "--output_dir", str(folder), "--num_threads", str(threads),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    result = json.loads(done.stdout.splitlines()[-1])
    keys = ("val_loss", "train_loss", "trained_parameters", "tokens_per_second", "seconds", "peak_memory_bytes")
    return {key: result[key] for key in keys}


def known() -> list[dict[str, Any]]:
    path = RESULTS / "tuning.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, the best rate of each method in bold."""
    lines = [
        "| method | learning rate | validation loss | trained parameters | tokens/s | memory |",
        "|---|---|---|---|---|---|",
    ]
    best: dict[str, float] = {}
    for one in results:
        if "val_loss" in one:
            best[one["run"]] = min(best.get(one["run"], float("inf")), one["val_loss"])
    for one in results:
        if "failed" in one:
            lines.append(f"| {one['run']} | {one['rate']} | failed ({one['failed']}) | | | |")
            continue
        loss = f"{one['val_loss']:.4f}"
        loss = f"**{loss}**" if one["val_loss"] == best[one["run"]] else loss
        lines.append(
            f"| {one['run']} | {one['rate']} | {loss} | {one['trained_parameters']:,} | "
            f"{one['tokens_per_second']:.0f} | "
            f"{one['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rates", nargs="+", help="in place of those of each method")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/alpaca_data.json")
    arguments = parser.parse_args()
    threads = 0 if arguments.jobs == 1 else 1
    asked = [(method, rate) for method in arguments.methods for rate in arguments.rates or RUNS[method][1]]
    with tempfile.TemporaryDirectory(prefix="tune-methods-") as name, ThreadPoolExecutor(arguments.jobs) as pool:
        files = rows_file(Path(name), arguments.data, train=16 * arguments.steps, val=64)

        def result(method: str, rate: str) -> dict[str, Any]:
            flags = RUNS[method][0]
            settings = {
                "run": method, "flags": flags, "rate": rate, "steps": arguments.steps, "base": BASE,
                "lora": [list(pair) for pair in LORA], "data": arguments.data.name,
            }  # fmt: skip
            before = [one for one in known() if settings.items() <= one.items() and "failed" not in one]
            if before:
                return before[-1]
            folder = Path(name) / f"{method}-{rate}"
            found = {**settings, **run(flags, rate, arguments.steps, files, folder, threads), "jobs": arguments.jobs}
            keep("tuning", found)
            print(json.dumps({key: found.get(key) for key in ("run", "rate", "val_loss", "failed")}), flush=True)
            return found

        results = list(pool.map(lambda pair: result(*pair), asked))
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
