"""What few bits cost in training: QLoRA against LoRA in bfloat16; training for few bits against quantizing afterwards.

    .venv/bin/python benchmarks/bench_quantized_training.py [--runs lora "qlora nf4" ...] [--rates 1e-3] [--steps 48]

The same rows of Alpaca, steps and batches for all, peft's too. `lora` and the `qat` runs are folded and quantized in
the end, each by the targets that concern it, and the validation loss is that of the quantized model. Runs that
benchmarks/results/quantized_training.jsonl holds already (same settings) are not made again. Prints a Markdown table;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.adapters.peft_format import load_adapter  # noqa: E402
from alpaca_lora.commands.schemas import FinetuneConfig  # noqa: E402
from alpaca_lora.config import resolve  # noqa: E402
from alpaca_lora.data.loader import Loader  # noqa: E402
from alpaca_lora.data.prepare import prepare  # noqa: E402
from alpaca_lora.device import pick_compute  # noqa: E402
from alpaca_lora.quantization.load import load_base  # noqa: E402
from alpaca_lora.quantization.plan import Plan  # noqa: E402
from alpaca_lora.quantization.qat import fold  # noqa: E402
from alpaca_lora.text.templates import load_template  # noqa: E402
from alpaca_lora.training.loss import causal_lm_loss  # noqa: E402
from alpaca_lora.training.micro_batch import rounded_up  # noqa: E402
from benchmarks.bench_finetune import dense_folder  # noqa: E402
from benchmarks.machine_card import RESULTS, keep  # noqa: E402
from benchmarks.tune_methods import BASE, rows_file  # noqa: E402

NAME = "quantized_training"
# what a trained model is quantized to: (scheme, settings of the plan). Groups of 128 divide 1536 of this model's widths
# and not 576, where 64 are taken; 192 is the largest that divides both
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {}),
    "int4 symmetric, group 192": ("int4", {"symmetric": True, "group_size": 192}),
}
START = ["--init_lora_weights", "rounding_error"]
WIDE = ["--lora_r", "64", "--lora_alpha", "128"]
NF4_GPTQ = ["--scheme", "nf4", "--rounding", "gptq"]
MIXED = ["--scheme", "mixed", "--rounding", "gptq", "--bits"]


@dataclass(frozen=True)
class Run:
    """flags: of our command, or of the run that a peer does after us. targets: what it is quantized to in the end.
    made: flags of `quantize`, of a folder that is its base. peer: None, or peft on a base that is dense or nf4.
    """

    flags: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    peer: Literal["dense", "nf4"] | None = None


RUNS: dict[str, Run] = {
    "lora": Run(targets=list(TARGETS)),
    "qlora int8": Run(["--quantize", "int8"]),
    "qlora nf4": Run(["--quantize", "nf4"]),
    "qlora int4": Run(["--quantize", "int4"]),
    "qlora nf4, from the rounding error": Run(["--quantize", "nf4", *START]),
    "qlora nf4 gptq": Run(made=NF4_GPTQ),
    "qlora nf4 gptq, from the rounding error": Run(START, made=NF4_GPTQ),
    "qlora mixed 4.5 gptq": Run(made=[*MIXED, "4.5"]),
    "qlora mixed 4.5 gptq, from the rounding error": Run(START, made=[*MIXED, "4.5"]),
    "qlora mixed 6 gptq, from the rounding error": Run(START, made=[*MIXED, "6"]),
    "peft lora": Run(peer="dense"),
    "peft qlora, bitsandbytes nf4": Run(peer="nf4"),
    "lora r=64": Run(WIDE),
    "qlora r=64 nf4, from the rounding error": Run(
        ["--lora_r", "64", "--lora_alpha", "128", "--quantize", "nf4", *START]
    ),
    "qlora r=64 nf4 gptq, from the rounding error": Run([*WIDE, *START], made=NF4_GPTQ),
    "qat int4": Run(["--quantization_aware", "int4"], ["int4"]),
    "qat int4 symmetric": Run(
        ["--quantization_aware", "int4", "--symmetric", "true", "--group_size", "192"], ["int4 symmetric, group 192"]
    ),
}
LORA = "--lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --lora_dropout 0"
GOAL = 0.02  # nats that QLoRA may lose against LoRA


def our_flags(run: Run, rate: str, steps: int, files: tuple[Path, Path], folder: Path, threads: int) -> list[str]:
    """What follows `finetune`; a flag of the run takes the place of another of its name."""
    words = [
        *BASE.split(), *LORA.split(), "--data_path", str(files[0]), "--val_data_path", str(files[1]),
        "--max_steps", str(steps), "--eval_steps", str(steps), "--save_steps", "100000", "--learning_rate", rate,
        "--num_sample_answers", "0", "--output_dir", str(folder), "--num_threads", str(threads), *run.flags,
    ]  # fmt: skip
    return [word for pair in dict(zip(words[::2], words[1::2], strict=True)).items() for word in pair]


def train(run: Run, flags: list[str], calibration: Path, folder: Path, threads: int) -> dict[str, Any]:
    """One run; its figures, or ``failed``. ``calibration``: the rows that a base is made on."""
    if run.peer is not None:
        return peer(run, flags, folder, threads)
    if run.made:
        base = folder.with_name("base-" + hashlib.sha256(" ".join(run.made).encode()).hexdigest()[:8])
        if not base.exists():
            rows = ["--calibration_data", str(calibration), "--prompt_template_name", "alpaca"]
            made = child([
                sys.executable, "-m", "alpaca_lora", "quantize", "--base_model", "smollm2-135m", *run.made, *rows,
                "--output_dir", str(base), "--num_threads", str(threads), "--json",
            ])  # fmt: skip
            if "failed" in made:
                return made
        flags = [str(base) if before == "--base_model" else flag for before, flag in pairwise(["", *flags])]
    result = child([sys.executable, "-m", "alpaca_lora", "finetune", *flags, "--json"])
    keys = ("val_loss", "train_loss", "trained_parameters", "tokens_per_second", "seconds", "peak_memory_bytes")
    return result if "failed" in result else {key: result[key] for key in keys}


def peer(run: Run, flags: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """peft and transformers on the same rows and rates."""
    model = folder.with_name("dense")
    if not model.exists():
        dense_folder(load_base("smollm2-135m", pick_compute("cpu", "float32")), model)
    job = folder.with_suffix(".json")
    content = {"model": str(model), "flags": flags, "quantized": run.peer == "nf4", "threads": threads}
    job.write_text(json.dumps(content))
    return child([sys.executable, str(ROOT / "benchmarks/peer_quantized_training.py"), str(job)])


def child(command: list[str]) -> dict[str, Any]:
    """The JSON object in the last line of what a command prints."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, text=True)
    return {"failed": done.returncode} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def quantized_loss(folder: Path, target: str, threads: int) -> dict[str, Any]:
    """In a process of its own: the validation loss of the run's adapter, folded into its base and quantized."""
    return child([
        sys.executable, str(Path(__file__)), "--evaluate", str(folder), "--target", target, "--threads", str(threads)
    ])  # fmt: skip


@torch.no_grad()
def evaluate(folder: Path, target: str, threads: int) -> dict[str, Any]:
    """The mean loss per supervised token on the run's own validation rows, in nats."""
    config = resolve(FinetuneConfig, ["--config", str(folder / "config.yml")], "finetune").value
    compute = pick_compute(config.device, config.dtype, threads)
    base = load_base(config.base_model, compute)
    scheme, settings = TARGETS[target]
    plan = Plan.uniform(base.model, scheme, settings)
    load_adapter(folder, base.model, base.fingerprint)
    errors = fold(base.model, plan)
    template = load_template(config.prompt_template_name, base.tokenizer)
    rows = prepare(config, base.tokenizer, template, system_prompt=config.system_prompt, seed=config.seed).val
    assert rows is not None
    loader = Loader(
        rows, batch_size=config.batch_size, token_budget=config.micro_batch_size * config.cutoff_len, seed=config.seed
    )
    total, count = 0.0, 0
    for batch in loader.eval_batches():
        total += float(causal_lm_loss(base.model, rounded_up(batch), 1))
        count += batch.num_supervised
    return {"val_loss": total / count, "mean_error": sum(errors.values()) / len(errors)}


def known() -> list[dict[str, Any]]:
    path = RESULTS / f"{NAME}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: each run's validation loss as it was trained, and quantized afterwards."""
    quantized = " | ".join(f"as {target}" for target in TARGETS)
    lines = [
        f"| run | learning rate | validation loss | {quantized} | tokens/s | memory |",
        "|---|---|---|" + "---|" * (len(TARGETS) + 2),
    ]
    for one in results:
        if "failed" in one:
            lines.append(f"| {one['run']} | {one['rate']} | failed ({one['failed']}) |" + " |" * (len(TARGETS) + 2))
            continue
        losses = [f"{one['quantized'][t]['val_loss']:.4f}" if t in one["quantized"] else "" for t in TARGETS]
        lines.append(
            f"| {one['run']} | {one['rate']} | {one['val_loss']:.4f} | {' | '.join(losses)} | "
            f"{one['tokens_per_second']:.0f} | {one['peak_memory_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """The goals, each run at its best rate: QLoRA within `GOAL` of LoRA; QAT better than quantizing afterwards."""
    best: dict[str, dict[str, Any]] = {}
    for one in results:
        if "failed" not in one and one["val_loss"] < best.get(one["run"], {"val_loss": float("inf")})["val_loss"]:
            best[one["run"]] = one
    lines, lora = [], best.get("lora")
    if lora is None:
        return lines
    for name, one in best.items():
        against = reference(name, best)
        if against is not None:
            lost = one["val_loss"] - best[against]["val_loss"]
            lines.append(f"{name} against {against}: {lost:+.4f} nats, {'within' if lost <= GOAL else 'beyond'} {GOAL}")
        for target in one["quantized"] if name.startswith("qat") else ():
            gained = lora["quantized"][target]["val_loss"] - one["quantized"][target]["val_loss"]
            lines.append(f"{name} against lora quantized afterwards ({target}): {gained:+.4f} nats better")
    return lines


def reference(name: str, known_runs: Mapping[str, Any]) -> str | None:
    """The run beside dense weights, of the same rank and program, that a run is measured against."""
    if "qlora" not in name:
        return None
    against = "peft lora" if name.startswith("peft") else "lora r=64" if "r=64" in name else "lora"
    return against if against in known_runs else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rates", nargs="+", default=["1e-3"], help="learning rates, the same for all runs")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/alpaca_data.json")
    parser.add_argument("--evaluate", type=Path, help="only this run folder's loss, quantized to --target")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.evaluate is not None:
        print(json.dumps(evaluate(arguments.evaluate, arguments.target, arguments.threads)))
        return
    threads = arguments.threads if arguments.jobs == 1 else 1
    asked = [(name, rate) for name in arguments.runs for rate in arguments.rates]
    with tempfile.TemporaryDirectory(prefix="quantized-training-") as name, ThreadPoolExecutor(arguments.jobs) as pool:
        files = rows_file(Path(name), arguments.data, train=16 * arguments.steps, val=64)

        def result(run: str, rate: str) -> dict[str, Any]:
            asked_for = RUNS[run]
            targets = asked_for.targets
            settings = {
                "run": run, "flags": [*asked_for.made, *asked_for.flags], "rate": rate, "steps": arguments.steps,
                "base": BASE, "lora": LORA,
                "targets": {target: list(TARGETS[target]) for target in targets}, "data": arguments.data.name,
            }  # fmt: skip
            before = [one for one in known() if settings.items() <= one.items() and "failed" not in one]
            if before:
                return before[-1]
            folder = Path(name) / f"{run.replace(' ', '-')}-{rate}"
            flags = our_flags(asked_for, rate, arguments.steps, files, folder, threads)
            found = {**settings, **train(asked_for, flags, files[0], folder, threads), "jobs": arguments.jobs}
            if "failed" not in found:
                found["quantized"] = {target: quantized_loss(folder, target, threads) for target in targets}
            keep(NAME, found)
            print(json.dumps({key: found.get(key) for key in ("run", "rate", "val_loss", "quantized")}), flush=True)
            return found

        results = list(pool.map(lambda pair: result(*pair), asked))
    print(table(results))
    print("\n".join(verdicts(results)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
