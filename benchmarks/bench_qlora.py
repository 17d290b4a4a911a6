"""QLoRA on a processor: ours against bitsandbytes + peft + transformers, and ours in 4 bits against ours in bfloat16.

    python benchmarks/bench_qlora.py [--layers 4] [--model DIR] [--parts 7b disk peer 135m]

7b: loading a random Llama of LLaMA-7B's shape from bfloat16 files to NF4, then three optimizer steps on 1,024 tokens,
LoRA of rank 16 on q, k, v, o, within 6.0 GB (gradient_checkpointing auto: in memory alone). disk: the same with
gradient_checkpointing disk, within the same memory; what is written to the disk is counted. peer: the same tokens
through bitsandbytes (NF4, double quantization, bfloat16, gradient checkpointing). 135m: steps of our smollm2-135m in
NF4 and in bfloat16, in turn.

Each contender is a process of its own (qlora_worker.py) with its own high-water mark of resident memory, loading and
preflight included; they run one after the other. Speed is tokens over seconds of the steps, the first left out, which
warms up (without other steps it counts). ``--layers`` takes fewer layers of the same shape, for a quick look: time and
memory of layers are in proportion. The last line is JSON and is kept in benchmarks/results/qlora.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.device import physical_cores  # noqa: E402
from benchmarks.machine_card import keep  # noqa: E402
from benchmarks.make_random_llama import make  # noqa: E402

PARTS = ("7b", "disk", "peer", "135m")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, TOKENS, STEPS, SEED = 16, 1024, 3, 42
MOST_BYTES, LOADING, SPEED, SHARE = 6.0e9, 1.3, 1.2, 0.8  # the goals
SMALL, SMALL_STEPS, SMALL_ROUNDS = "smollm2-135m", 6, 3
console = Console(stderr=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One contender in its own process."""
    console.print(f"running: {job['contender']}, {job['quantize'] or 'bfloat16'}, {job['model']}", highlight=False)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, str(ROOT / "benchmarks/qlora_worker.py"), file.name]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    result = json.loads(done.stdout.splitlines()[-1])
    timed = result["step_seconds"][1:] or result["step_seconds"]
    result["tokens_per_second"] = job["tokens"] / statistics.mean(timed)
    return result


def job_of(contender: str, model: str, quantize: str | None, threads: int, **more: Any) -> dict[str, Any]:
    return {
        "contender": contender, "model": model, "quantize": quantize, "tokens": TOKENS, "steps": STEPS, "rank": RANK,
        "targets": TARGETS, "seed": SEED, "threads": threads, "checkpointing": "auto", "optimizer_state": "float32",
        "max_memory_gb": MOST_BYTES / 1e9, **more,
    }  # fmt: skip


def small(threads: int) -> dict[str, dict[str, Any]]:
    """The 135M model in NF4 and bfloat16, processes in turn; of each the best round, which was disturbed least."""
    rounds: dict[str, list[dict[str, Any]]] = {"nf4": [], "bfloat16": []}
    for _ in range(SMALL_ROUNDS):
        for name, quantize in (("nf4", "nf4"), ("bfloat16", None)):
            job = job_of("ours", SMALL, quantize, threads, steps=SMALL_STEPS, checkpointing=False, max_memory_gb=None)
            rounds[name].append(run(job))
    return {name: max(found, key=lambda one: one.get("tokens_per_second", 0)) for name, found in rounds.items()}


def verdicts(runs: dict[str, dict[str, Any]], layers: int | None) -> dict[str, Any]:
    """What the goals ask for, as far as it was measured."""
    found: dict[str, Any] = {}
    peer = runs.get("peer, 7b")
    for name in ("ours, 7b", "ours, 7b disk"):
        ours, of = runs.get(name), "disk_" if name.endswith("disk") else ""
        if not ours or "failed" in ours:
            continue
        found[f"{of}peak_gb"] = ours["peak_memory_bytes"] / 1e9
        found[f"{of}loading_share"] = ours["load_peak_bytes"] / ours["weight_bytes"]
        if layers is None:
            found[f"{of}fits_6_gb"] = ours["peak_memory_bytes"] <= MOST_BYTES
            found[f"{of}loads_lean"] = found[f"{of}loading_share"] <= LOADING
        if peer and "failed" not in peer:
            found[f"{of}speed_over_peer"] = ours["tokens_per_second"] / peer["tokens_per_second"]
            found[f"{of}memory_share_of_peer"] = ours["peak_memory_bytes"] / peer["peak_memory_bytes"]
            found[f"{of}faster_by_a_fifth"] = found[f"{of}speed_over_peer"] >= SPEED
    pair = runs.get("ours, 135m nf4"), runs.get("ours, 135m bfloat16")
    if all(one and "failed" not in one for one in pair):
        nf4, dense = pair
        found["share_of_bfloat16_speed"] = nf4["tokens_per_second"] / dense["tokens_per_second"]  # pyright: ignore
        found["keeps_four_fifths"] = found["share_of_bfloat16_speed"] >= SHARE
    return found


def report(runs: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for heading in ("run", "tokens/s", "weights", "peak loading", "peak", "loading", "last loss"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, one in runs.items():
        if "failed" in one:
            table.add_row(name, one["failed"])
            continue
        sizes = (f"{one[key] / 1e9:.2f} GB" for key in ("weight_bytes", "load_peak_bytes", "peak_memory_bytes"))
        seconds, loss = f"{one['load_seconds']:.0f} s", f"{one['losses'][-1]:.4f}"
        table.add_row(name, f"{one['tokens_per_second']:.2f}", *sizes, seconds, loss)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of LLaMA-7B's 32")
    parser.add_argument("--model", type=Path, help="a folder that make_random_llama.py made; none: made and removed")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where 14 GB find room")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max_memory_gb", type=float, default=5.8, help="what the preflight fills: less than the goal")
    asked = parser.parse_args()
    threads = asked.threads or physical_cores()
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-qlora-", dir=asked.scratch) as name:
        if {"7b", "disk", "peer"} & set(asked.parts):
            model = asked.model or Path(name) / "model"
            if asked.model is None:
                console.print(json.dumps(make(model, "7b", layers=asked.layers, seed=SEED)), markup=False)
            limit = {"max_memory_gb": asked.max_memory_gb}
            if "7b" in asked.parts:
                runs["ours, 7b"] = run(job_of("ours", str(model), "nf4", threads, **limit))
            if "disk" in asked.parts:
                runs["ours, 7b disk"] = run(job_of("ours", str(model), "nf4", threads, checkpointing="disk", **limit))
            if "peer" in asked.parts:
                runs["peer, 7b"] = run(job_of("peer", str(model), "nf4", threads))
    if "135m" in asked.parts:
        runs |= {f"ours, 135m {name}": one for name, one in small(threads).items()}
    title = f"NF4, LoRA r {RANK} on q,k,v,o, {TOKENS} tokens a step"
    report(runs, title + (f", {asked.layers} layers" if asked.layers else ""))
    found = {key: round(value, 3) if isinstance(value, float) else value for key, value in
             verdicts(runs, asked.layers).items()}  # fmt: skip
    console.print(found)
    card = {"layers": asked.layers, "tokens": TOKENS, "steps": STEPS, "rank": RANK, "threads": threads}
    print(keep("qlora", {**card, "runs": runs, **found}))


if __name__ == "__main__":
    main()
