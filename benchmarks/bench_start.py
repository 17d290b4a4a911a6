"""How long it takes to begin: the data stage cold and cached, loading the base, a cold `finetune` on cached data.

    .venv/bin/python benchmarks/bench_start.py [--data FILE]

Each figure is of a process of its own; seconds of the data stage and of loading are after the imports. The last line is
JSON and is kept in benchmarks/results/start.jsonl.
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

from benchmarks.machine_card import keep  # noqa: E402

DATA = """
import json, sys, time
from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.prepare import prepare
from alpaca_lora.text.templates import load_template
from alpaca_lora.text.tokenizer import Tokenizer
from alpaca_lora.weights.gguf import open_gguf
from alpaca_lora.weights.hub import resolve
tokenizer = Tokenizer.from_gguf(open_gguf(resolve("smollm2-135m")).tokenizer_fields)
template = load_template("alpaca", tokenizer)
started = time.perf_counter()
prepared = prepare(DataOptions(data_path=[sys.argv[1]]), tokenizer, template)
seconds = time.perf_counter() - started
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak, "rows": prepared.ledger.rows_in}))
"""
LOAD = """
import json, time
from alpaca_lora.device import peak_memory_bytes, pick_compute
from alpaca_lora.models.load import load_base
started = time.perf_counter()
load_base("smollm2-135m", pick_compute())
print(json.dumps({"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}))
"""


def child(code: str, *words: str, env: dict[str, str]) -> dict[str, Any]:
    """Run the code in a process of its own; its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=env, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def first_step(data: Path, folder: Path, env: dict[str, str]) -> float:
    """Seconds from the command to its first micro-batch; the preflight's probe is recalled from an earlier run."""
    command = [
        sys.executable,
        "-m",
        "alpaca_lora",
        "finetune",
        "--base_model",
        "smollm2-135m",
        "--data_path",
        str(data),
    ]
    command += ["--prompt_template_name", "alpaca", "--max_steps", "1", "--batch_size", "4", "--val_set_size", "0"]
    command += ["--num_sample_answers", "0", "--output_dir"]
    subprocess.run([*command, str(folder / "first")], env=env, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, str(folder / "second")], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        seconds = next(time.perf_counter() - started for line in running.stderr if line.startswith("training:"))
        for _ in running.stderr:
            pass
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/alpaca_data.json")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        folder = Path(name)
        env = {**os.environ, "ALPACA_LORA_HOME": str(folder / "home")}
        pull = [sys.executable, "-m", "alpaca_lora", "pull", "smollm2-135m"]
        subprocess.run(pull, env=env, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        result = {
            "data_cold": child(DATA, str(data), env=env), "data_cached": child(DATA, str(data), env=env),
            "load": child(LOAD, env=env), "first_micro_batch_seconds": first_step(data, folder, env),
        }  # fmt: skip
    print(keep("start", result))


if __name__ == "__main__":
    main()
