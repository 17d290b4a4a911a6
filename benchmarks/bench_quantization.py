"""Every scheme of ours and the peers' beside each other: perplexity, bytes, load time, prefill and decode speed.

    .venv/bin/python benchmarks/bench_quantization.py [--schemes nf4 int4-gptq ...] [--tokens 65536] [--dtype bfloat16]

Ours: `alpaca-lora quantize` writes a folder, a process of its own loads it and is measured. Peers: bitsandbytes through
transformers, torchao's weight-only int8 and int4, transformers in bfloat16; they load a bfloat16 folder of the same
dense weights. Perplexity: WikiText-2 test in windows of 1,024 tokens, every token but each window's first. Calibration
rows are of the validation file, never of the test file. Runs that benchmarks/results/quantization.jsonl holds already
(same settings) are not made again. Prints a Markdown table, draws docs/pictures/quantization.png (perplexity against
bytes); the last line is JSON.
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

from benchmarks.machine_card import RESULTS, keep  # noqa: E402

DATA = ROOT.parent / "shared/data/wikitext2"
PICTURE = ROOT / "docs/pictures/quantization.png"
# from the checkout's root, where all commands run: results say it
CALIBRATION = ["--calibration_data", os.path.relpath(DATA / "valid.txt", ROOT)]
# name -> flags of `alpaca-lora quantize`; None: the dense model
OURS: dict[str, list[str] | None] = {
    "bfloat16": None,
    "int8": ["--scheme", "int8"],
    "fp8 e4m3": ["--scheme", "fp8", "--fp8_format", "e4m3"],
    "fp8 e5m2": ["--scheme", "fp8", "--fp8_format", "e5m2"],
    "int8 dynamic": ["--scheme", "int8_dynamic"],
    "int8 static": ["--scheme", "int8_static", *CALIBRATION],
    "nf4": ["--scheme", "nf4"],
    "fp4": ["--scheme", "fp4"],
    # groups of 128 where that divides the inputs (1536), of 64 where not (576)
    "int4": ["--scheme", "int4"],
    "nf4 gptq": ["--scheme", "nf4", "--rounding", "gptq", *CALIBRATION],
    "int4 gptq": ["--scheme", "int4", "--rounding", "gptq", *CALIBRATION],
    "int4 awq": ["--scheme", "int4", "--rounding", "awq", *CALIBRATION],
    "mixed 4.5": ["--scheme", "mixed", "--bits", "4.5", *CALIBRATION],
    "mixed 4.5 gptq": ["--scheme", "mixed", "--bits", "4.5", "--rounding", "gptq", *CALIBRATION],
}
PEERS = ("transformers bfloat16", "bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "torchao int4")
COLUMNS = ("perplexity", "weight_bytes", "load_seconds", "prefill", "decode", "peak_memory_bytes")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def child(program: list[str], *, quiet: bool = True) -> dict[str, Any]:
    """Run a program of its own; the JSON of its last line."""
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, text=True, check=False,
        stderr=subprocess.PIPE if quiet else None,
    )  # fmt: skip
    if done.returncode:
        return {"failed": (done.stderr or "").strip().splitlines()[-1:] or [str(done.returncode)]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, model: str, dense: Path, tokens: int, folder: Path) -> dict[str, Any]:
    """One contender: quantize if it is ours, then load and measure it in a process of its own."""
    worker = [sys.executable, str(ROOT / "benchmarks/quantization_worker.py"), "--tokens", str(tokens), "--name", name]
    found: dict[str, Any] = {}
    if name in PEERS:
        return {**found, **child([*worker, "--folder", str(dense)])}
    flags, source = OURS[name], model
    if flags is not None:
        started = time.perf_counter()
        command = [sys.executable, "-m", "alpaca_lora", "quantize", "--base_model", model, "--json", *flags]
        made = child([*command, "--output_dir", str(folder)])
        if "failed" in made:
            return made
        found = {"quantize_seconds": round(time.perf_counter() - started, 1)}
        source = str(folder)
    return {**found, **child([*worker, "--folder", source])}


def known() -> list[dict[str, Any]]:
    path = RESULTS / "quantization.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| weights | perplexity | bytes | bits/weight | quantize | load | prefill 512, tokens/s | decode, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        if "failed" in one:
            lines.append(f"| {one['run']} | failed: {one['failed'][0][:100]} | | | | | | |")
            continue
        made = f"{one['quantize_seconds']:.1f} s" if "quantize_seconds" in one else ""
        lines.append(
            f"| {one['run']} | {one['perplexity']:.3f} | {one['weight_bytes'] / 1e6:.1f} MB | "
            f"{one['linear_bits']:.2f} | {made} | {one['load_seconds']:.1f} s | {one['prefill']:.0f} | "
            f"{one['decode']:.1f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bytes, ours and the peers' apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    good = [one for one in results if "failed" not in one]
    for is_peer, marker, color in ((False, "o", "#1f6fb4"), (True, "s", "#b4491f")):
        chosen = [one for one in good if (one["run"] in PEERS) == is_peer]
        xs, ys = [one["weight_bytes"] / 1e6 for one in chosen], [one["perplexity"] for one in chosen]
        axes.scatter(xs, ys, marker=marker, color=color, label="others" if is_peer else "alpaca-lora", zorder=3)
    axes.margins(x=0.2, y=0.06)
    axes.set_xlim(right=axes.get_xlim()[1] + 12)  # room for the last label
    low, high = axes.get_ylim()
    for one, x, y, y_text in _labels(good, (high - low) / 26):
        axes.annotate(
            one["run"], (x, y), xytext=(x + 4, y_text), fontsize=8, va="center",
            color="#b4491f" if one["run"] in PEERS else "#1f6fb4",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.6},
        )  # fmt: skip
    axes.set_xlabel("bytes of the whole model, MB")
    axes.set_ylabel("perplexity, WikiText-2 (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _labels(results: list[dict[str, Any]], least: float) -> list[tuple[dict[str, Any], float, float, float]]:
    """(result, x, y, height of its label), the labels of points that stand about one above the other kept apart."""
    found: list[tuple[dict[str, Any], float, float, float]] = []
    for one in sorted(results, key=lambda one: one["perplexity"]):
        x, y = one["weight_bytes"] / 1e6, one["perplexity"]
        below = [height for _, other, _, height in found if abs(other - x) < 30]
        found.append((one, x, y, max([y, *(height + least for height in below)])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of the test file; 0: all")
    parser.add_argument("--anew", action="store_true", help="also measure what the results hold already")
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-quantization-") as name:
        dense = Path(name) / "dense"
        for run in asked.schemes:
            settings = {"run": run, "flags": OURS.get(run), "model": asked.base_model, "tokens": asked.tokens}
            before = [one for one in known() if settings.items() <= one.items() and "failed" not in one]
            if before and not asked.anew:
                results.append(before[-1])
                continue
            if run in PEERS and not dense.exists():
                child([
                    sys.executable, str(ROOT / "benchmarks/quantization_worker.py"), "--export", str(dense),
                    "--folder", asked.base_model,
                ])  # fmt: skip
            folder = Path(name) / run.replace(" ", "-")
            results.append({**settings, **measure(run, asked.base_model, dense, asked.tokens, folder)})
            keep("quantization", results[-1])
            print(table(results), flush=True)
    print(table(results))
    draw(results, PICTURE)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
