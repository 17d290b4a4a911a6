"""Our service, transformers' `generate` and llama.cpp's server beside each other: one model, the same prompts, greedy.

    python benchmarks/bench_serve.py [--rounds 3] [--new_tokens 64] [--contenders NAME ...] [--parts NAME ...]

single: a prompt of 64 tokens alone. prefill: one of 512. batch: 8 of 64 at once. adapters: the batch again, with 1, 4
and 8 different LoRA adapters (rank 16 on q, k, v, o, random numbers) beside the base alone. health: /health while 8
prompts of 512 tokens are read and answered. Prompts are text of WikiText-2 and new in each round, so no cache helps.

Each contender is a process of its own (serve_worker.py), one after the other; rounds repeat, every other one backwards,
and medians count; a ratio is the median of those of single rounds. llama.cpp has the very file of the model (Q4_1) and
copies of it in bfloat16 and Q8_0; its environment (requirements-llama.txt) is made on the first run, and where that
fails its rows say so. In float32 ours and transformers have to say the same. The last line is JSON and is kept in
benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.device import physical_cores  # noqa: E402
from alpaca_lora.models.load import load_tokenizer, open_source  # noqa: E402
from alpaca_lora.text.tokenizer import Tokenizer  # noqa: E402
from alpaca_lora.weights.hub import resolve  # noqa: E402
from benchmarks import serve_figures as figures  # noqa: E402
from benchmarks.gguf_copy import copy_as  # noqa: E402
from benchmarks.machine_card import keep  # noqa: E402
from benchmarks.random_adapters import make_adapters  # noqa: E402

TEXT = ROOT.parent / "shared/data/wikitext2/test.txt"
LLAMA = ROOT / ".venv-llama"
PARTS = ("single", "prefill", "batch", "adapters", "health")
SHORT, LONG, STREAMS, SINGLES, PREFILLS = 64, 512, 8, 3, 3
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours, bfloat16": {"kind": "engine", "dtype": "bfloat16"},
    "ours, float32": {"kind": "engine", "dtype": "float32"},
    "ours, int8": {"kind": "engine", "dtype": "bfloat16", "quantize": "int8"},
    "ours, nf4": {"kind": "engine", "dtype": "bfloat16", "quantize": "nf4"},
    "ours, bfloat16, HTTP": {"kind": "server", "dtype": "bfloat16"},
    "transformers, bfloat16": {"kind": "transformers", "dtype": "bfloat16"},
    "transformers, float32": {"kind": "transformers", "dtype": "float32"},
    "llama.cpp, bfloat16, HTTP": {"kind": "llama", "gguf": "BF16"},
    "llama.cpp, Q8_0, HTTP": {"kind": "llama", "gguf": "Q8_0"},
    "llama.cpp, Q4_1, HTTP": {"kind": "llama", "gguf": None},
}
SINGLE_GOAL, BATCH_GOAL, ADAPTERS_GOAL, HEALTH_GOAL = 1.5, 4.0, 0.75, 100.0
RATIOS = {
    "our HTTP over our engine": ("ours, bfloat16, HTTP", "ours, bfloat16"),
    "our HTTP over llama.cpp's, bfloat16": ("ours, bfloat16, HTTP", "llama.cpp, bfloat16, HTTP"),
    "our int8 over llama.cpp's Q8_0": ("ours, int8", "llama.cpp, Q8_0, HTTP"),
    "our nf4 over llama.cpp's Q4_1": ("ours, nf4", "llama.cpp, Q4_1, HTTP"),
}
# a table that is written to a file is as wide as it needs
console = Console(stderr=True, width=None if sys.stderr.isatty() else 130)
Results = dict[str, list[dict[str, Any]]]  # contender -> of each round


class Prompts:
    """Pieces of a text, each of an exact number of tokens and used once."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer, self._ids, self._at = tokenizer, tokenizer.encode_text(text), 0

    def take(self, count: int, num_tokens: int) -> list[dict[str, Any]]:
        """As ids and as text; only pieces that a server which reads text makes the same ids of."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            ids = self._ids[self._at : self._at + num_tokens]
            if len(ids) < num_tokens:
                raise ValueError("the text is too short for so many rounds")
            self._at += num_tokens
            text = self._tokenizer.decode(ids)
            if self._tokenizer.encode_text(text) == ids:
                found.append({"ids": ids, "text": text})
        return found

    def of_a_round(self) -> dict[str, Any]:
        return {
            "warm": {"single": self.take(1, SHORT), "prefill": self.take(1, LONG), "batch": self.take(STREAMS, SHORT)},
            "single": self.take(SINGLES, SHORT), "prefill": self.take(PREFILLS, LONG),
            "batch": self.take(STREAMS, SHORT), "long_batch": self.take(STREAMS, LONG),
        }  # fmt: skip


def llama_python() -> str | None:
    """The interpreter that has llama.cpp's server; None where it cannot be had."""
    python, done = LLAMA / "bin/python", LLAMA / ".installed"
    wanted = ROOT / "benchmarks/requirements-llama.txt"
    if not done.exists() or done.stat().st_mtime < wanted.stat().st_mtime:
        console.print("installing llama.cpp's server; to build it takes some minutes", highlight=False)
        # its part for pictures takes a third of the build
        environment = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", **os.environ}
        made = subprocess.run([sys.executable, "-m", "venv", str(LLAMA)])
        pip = [str(python), "-m", "pip", "install", "-q", "-r", str(wanted)]
        if made.returncode or subprocess.run(pip, env=environment).returncode:
            return None
        done.touch()
    return str(python)


def copies(base_model: str, folder: Path, names: list[str]) -> dict[str | None, str]:
    """The GGUF files that the chosen contenders of llama.cpp read; none for a model that is no GGUF file."""
    path = resolve(base_model)
    kinds = {CONTENDERS[name]["gguf"] for name in names if CONTENDERS[name]["kind"] == "llama"}
    if not path.is_file():
        return {}
    made = {kind: copy_as(path, folder / f"{kind}.gguf", GGMLQuantizationType[kind]) for kind in kinds - {None}}
    return {None: str(path), **{kind: str(copy) for kind, copy in made.items()}}


def run(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One contender in its own process."""
    console.print(f"running: {name}", highlight=False)
    if job["kind"] == "llama" and (job["python"] is None or job["gguf"] is None):
        return {"failed": "not installed" if job["python"] is None else "no GGUF file"}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, str(ROOT / "benchmarks/serve_worker.py"), file.name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        console.print(done.stderr[-3000:], markup=False, highlight=False)
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def run_all(asked: argparse.Namespace, threads: int, folder: Path) -> Results:
    """Every chosen contender in every round."""
    source = open_source(resolve(asked.base_model))
    prompts = Prompts(load_tokenizer(source), asked.text.read_text(encoding="utf-8")[: 1 << 19])
    source.close()
    ggufs = copies(asked.base_model, folder, asked.contenders)
    has_llama = any(CONTENDERS[name]["kind"] == "llama" for name in asked.contenders)
    fixed = {
        "model": asked.base_model, "threads": threads, "new_tokens": asked.new_tokens, "parts": asked.parts,
        "python": llama_python() if has_llama else None,
        "adapters": list(map(str, make_adapters(asked.base_model, folder, 8))) if "adapters" in asked.parts else [],
    }  # fmt: skip
    results: Results = {name: [] for name in asked.contenders}
    for number in range(asked.rounds):
        of_round = {**fixed, **prompts.of_a_round()}
        for name in asked.contenders[:: -1 if number % 2 else 1]:
            job = {**of_round, "quantize": None, **CONTENDERS[name]}
            if job["kind"] == "llama":
                job["gguf"] = ggufs.get(job["gguf"])
            results[name].append(run(name, job))
    return results


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one contender over all of its rounds that worked."""
    good = [one for one in rounds if "failed" not in one]
    if not good:
        return {"failed": rounds[0]["failed"]}
    runs = {part: [run for one in good for run in one[part]] for part in good[0] if part != "health_failures"}
    found: dict[str, Any] = {"failed_rounds": len(rounds) - len(good)}
    for part in [part for part in runs if part not in ("health", "prefill")]:
        found[part] = figures.streams(runs[part])
    if runs.get("prefill"):
        found["prefill"] = figures.prefill(runs["prefill"], LONG)
    if runs.get("health"):
        failures = sum(one["health_failures"] for one in good)
        found["health"] = {**figures.health(runs["health"]), "failures": failures}
    return found


def ratio(results: Results, over: tuple[str, str], under: tuple[str, str]) -> float | None:
    """Median over rounds of the speed of one (contender, part) over another's in the same round."""

    def speed(rounds: list[dict[str, Any]], number: int, part: str) -> float | None:
        runs = rounds[number].get(part) if number < len(rounds) else None
        return statistics.median(map(figures.decode_speed, runs)) if runs else None

    first, second = results.get(over[0], []), results.get(under[0], [])
    pairs = [(speed(first, n, over[1]), speed(second, n, under[1])) for n in range(len(first))]
    found = [a / b for a, b in pairs if a is not None and b is not None]
    return statistics.median(found) if found else None


def agreement(results: Results, dtype: str) -> dict[str, Any]:
    """Whether ours and transformers said the same, and where first not."""
    said = [
        (f"round {number}, {part}, ", *([ids for run in one[part] for ids in run["ids"]] for one in (a, b)))
        for number, (a, b) in enumerate(
            zip(results.get(f"ours, {dtype}", []), results.get(f"transformers, {dtype}", []), strict=False)
        )
        for part in ("single", "batch") if part in a and part in b
    ]  # fmt: skip
    parted = [where + place for where, a, b in said if (place := figures.first_difference(a, b)) is not None]
    tokens = [x == y for _, a, b in said for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)]
    share = sum(tokens) / len(tokens) if tokens else None
    return {"same": not parted if said else None, "first_difference": parted[0] if parted else None, "share": share}


def goals(results: Results, found: dict[str, Any]) -> dict[str, tuple[float | bool | None, str, bool | None]]:
    """Goal -> what was measured (None: it was not), what is asked for, whether it holds."""
    table: dict[str, tuple[float | bool | None, str, bool | None]] = {}

    def add(name: str, value: float | None, asked: str, holds: Callable[[float], bool]) -> None:
        table[name] = (value, asked, None if value is None else holds(value))

    for dtype in ("bfloat16", "float32"):
        ours, peer = f"ours, {dtype}", f"transformers, {dtype}"
        add(f"one stream over transformers', {dtype}", ratio(results, (ours, "single"), (peer, "single")),
            f"at least {SINGLE_GOAL}", lambda x: x >= SINGLE_GOAL)  # fmt: skip
        add(f"{STREAMS} streams over our one, {dtype}", ratio(results, (ours, "batch"), (ours, "single")),
            f"at least {BATCH_GOAL}", lambda x: x >= BATCH_GOAL)  # fmt: skip
        add(f"8 adapters over the base's batch, {dtype}", ratio(results, (ours, "adapters_8"), (ours, "batch")),
            f"at least {ADAPTERS_GOAL}", lambda x: x >= ADAPTERS_GOAL)  # fmt: skip
    health = found.get("ours, bfloat16, HTTP", {}).get("health")
    add("/health under load, the slowest, ms", health and health["max"], f"at most {HEALTH_GOAL:g}",
        lambda x: x <= HEALTH_GOAL and not health["failures"])  # fmt: skip
    same = agreement(results, "float32")["same"]
    table["float32 says what transformers says"] = (same, "yes", same)
    return table


def ratios(results: Results) -> dict[str, dict[str, float | None]]:
    """Speeds over those of others that nothing is asked of, for one stream and for many."""
    return {
        name: {part: ratio(results, (over, part), (under, part)) for part in ("single", "batch")}
        for name, (over, under) in RATIOS.items()
    }


def waits(figure: dict[str, float], name: str) -> str:
    return f"{figure[f'{name}_p50']:.0f} / {figure[f'{name}_p95']:.0f}"


def report(found: dict[str, Any], judged: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    heads = ("one stream", "prompt", "8 streams", "first, 1", "between, 1", "first, 8", "between, 8")
    table.add_column("tokens/s; ms, p50 / p95")
    for head in heads:
        table.add_column(head, justify="right")
    for name, one in found.items():
        single, batch = one.get("single"), one.get("batch")
        speeds = (single and single["decode"], one.get("prefill"), batch and batch["decode"])
        cells = [f"{speed:.1f}" if speed else "" for speed in speeds]
        cells += [waits(figure, key) if figure else "" for figure in (single, batch) for key in ("first", "between")]
        table.add_row(name, *([one["failed"]] if "failed" in one else cells))
    console.print(table)
    for name, one in found.items():
        counts = [count for count in (0, 1, 4, 8) if f"adapters_{count}" in one]
        speeds = ", ".join(f"{count}: {one[f'adapters_{count}']['decode']:.1f}" for count in counts)
        if counts:
            console.print(f"{name}, tokens/s of {STREAMS} streams by number of adapters: {speeds}", highlight=False)
    verdict = Table(title="goals")
    for head in ("goal", "measured", "asked for", "holds"):
        verdict.add_column(head)
    for name, (value, asked, holds) in judged.items():
        shown = "not measured" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        verdict.add_row(name, shown, asked, "" if holds is None else "yes" if holds else "NO")
    console.print(verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help=f"of {'; '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--text", type=Path, default=TEXT, help="where prompts come from")
    parser.add_argument("--dry", action="store_true", help="keep no result")
    asked = parser.parse_args()
    threads = asked.threads or physical_cores()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        results = run_all(asked, threads, Path(name))
    found = {name: summary(rounds) for name, rounds in results.items()}
    judged = goals(results, found)
    report(found, judged, f"{asked.base_model}, {threads} threads, {asked.new_tokens} new tokens")
    said = figures.rounded({dtype: agreement(results, dtype) for dtype in ("float32", "bfloat16")})
    beside = figures.rounded(ratios(results))
    console.print({"same answers as transformers": said, "speed over": beside})
    card = {"model": asked.base_model, "threads": threads, "new_tokens": asked.new_tokens, "rounds": asked.rounds}
    verdicts = {name: {"measured": value, "holds": holds} for name, (value, _, holds) in judged.items()}
    line = {
        **card,
        "runs": figures.rounded(found),
        "goals": figures.rounded(verdicts),
        "ratios": beside,
        "agreement": said,
    }
    print(json.dumps(line) if asked.dry else keep("serve", line))


if __name__ == "__main__":
    main()
