"""The serving benchmarks on a tiny model: that they count right, ask all the same, and run to their end."""

import json
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from alpaca_lora.weights.gguf import open_gguf
from alpaca_lora.weights.gguf_header import read_gguf_header
from benchmarks import bench_serve, serve_figures, serve_worker
from benchmarks.gguf_copy import copy_as
from benchmarks.random_adapters import make_adapters
from tests.commands.conftest import write_base
from tests.package_files import CHECKOUT
from tests.tiny import ByteTokenizer
from tests.weights.test_gguf import NAME, file_of_blocks

TEXT = "All about a small shop at the harbour, its clock and its two cats. " * 300


def test_speeds_and_waits() -> None:
    run = {"times": [[1.0, 2.0, 4.0], [1.5, 2.5]], "counts": [3, 2]}
    assert serve_figures.whole_speed(run) == 5 / 4
    assert serve_figures.decode_speed(run) == 3 / 2.5  # of the first stream two, of the second one
    # pieces of text that are fewer than the tokens; a second stream that waits for the end of the first
    assert serve_figures.decode_speed({"times": [[1.0, 2.0]], "counts": [4]}) == 2
    assert serve_figures.decode_speed({"times": [[1.0, 2.0], [3.0, 4.0]], "counts": [2, 2]}) == 1
    waits = serve_figures.waits([run])
    assert waits["first_p50"] == 1250 and waits["between_p50"] == 1000 and waits["between_p95"] == pytest.approx(1900)
    assert serve_figures.prefill([run, {"times": [[3.0]]}], 512) == 512 / 2
    assert math.isnan(serve_figures.percentile([], 0.5)) and serve_figures.rounded({"x": math.nan}) == {"x": None}


def test_the_first_difference_is_found() -> None:
    assert serve_figures.first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert serve_figures.first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == "prompt 1, token 1"
    assert serve_figures.first_difference([[1, 2]], [[1, 2, 3]]) == "prompt 0, token 2"


def test_goals_are_judged_by_rounds() -> None:
    def one(seconds: float, ids: list[int]) -> dict[str, Any]:
        return {"times": [[1.0, 1.0 + seconds]], "counts": [2], "ids": [ids]}

    results = {
        "ours, float32": [{"single": [one(1.0, [1])]}, {"single": [one(0.5, [1])]}, {"single": [one(0.25, [1])]}],
        "transformers, float32": [{"single": [one(2.0, [1])]}, {"failed": "x"}, {"single": [one(2.0, [2])]}],
    }
    goals = bench_serve.goals(results, {})
    assert goals["one stream over transformers', float32"] == (5.0, "at least 1.5", True)
    assert goals["one stream over transformers', bfloat16"] == (None, "at least 1.5", None)
    assert goals["float32 says what transformers says"] == (False, "yes", False)
    assert bench_serve.agreement(results, "float32")["first_difference"] == "round 2, single, prompt 0, token 0"
    assert bench_serve.summary(results["transformers, float32"])["failed_rounds"] == 1
    assert bench_serve.summary([{"failed": "not installed"}]) == {"failed": "not installed"}


def test_ours_and_transformers_do_the_same_work(tmp_path: Path) -> None:
    base = write_base(tmp_path / "tiny")
    rounds = bench_serve.Prompts(ByteTokenizer(), TEXT).of_a_round()
    assert len({prompt["text"] for prompt in (*rounds["single"], *rounds["batch"])}) == 11
    job = {
        **rounds, "model": str(base), "dtype": "float32", "quantize": None, "threads": 1, "new_tokens": 5,
        "parts": ["single", "prefill", "batch", "adapters"],
        "adapters": list(map(str, make_adapters(str(base), tmp_path, 2, rank=2))),
    }  # fmt: skip
    ours, theirs = serve_worker.engine(job), serve_worker.transformers_generate(job)
    assert bench_serve.agreement({"ours, float32": [ours], "transformers, float32": [theirs]}, "float32")["same"]
    for found in (ours, theirs):
        assert [run["counts"] for run in found["single"]] == [[5]] * 3 and found["batch"][0]["counts"] == [5] * 8
        assert all(times == sorted(times) and len(times) == 5 for times in found["batch"][0]["times"])
    # the adapters change what is said, or the part would measure nothing
    assert ours["adapters_0"][0]["ids"] == ours["batch"][0]["ids"] != ours["adapters_8"][0]["ids"]
    figures = bench_serve.summary([ours])
    bench_serve.report({"ours, float32": figures}, bench_serve.goals({"ours, float32": [ours]}, {}), "tiny")
    json.dumps(serve_figures.rounded(figures), allow_nan=False)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0])
def test_a_copy_of_a_gguf_file_has_other_matrices_and_nothing_else(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    source = file_of_blocks(tmp_path / "a.gguf", GGMLQuantizationType.Q4_1, 4, 64)
    copy = copy_as(source, tmp_path / "b.gguf", kind)
    before, after = read_gguf_header(source), read_gguf_header(copy)
    assert {name: block.shape for name, block in after.blocks.items()} == {
        name: block.shape for name, block in before.blocks.items()
    }
    assert {block.type for block in after.blocks.values()} == {kind}
    assert {k: v for k, v in after.fields.items() if k in before.fields and k != "general.file_type"} == {
        k: v for k, v in before.fields.items() if k != "general.file_type"
    }
    with closing(open_gguf(source)) as one, closing(open_gguf(copy)) as other:
        numbers, copied = one.read(NAME).float(), other.read(NAME).float()
    # a bfloat16 has 8 bits, and a block of Q8_0 steps of 1/127 of its largest number
    step = 2**-8 * numbers.abs() if kind == GGMLQuantizationType.BF16 else numbers.abs().max() / 127
    assert bool(((copied - numbers).abs() <= step).all()) and not bool((copied == 0).all())


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    base = write_base(tmp_path / "tiny")
    command = [sys.executable, str(CHECKOUT / "benchmarks/soak_serve.py"), "--dry", "--minutes", "0.1"]
    done = subprocess.run([*command, "--base_model", str(base)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["defects"] == [] and result["outcomes"]["load: 201"] >= 1 and result["health_ms"]["probes"] >= 5
    timely = {"memory is flat", "/health within 100 ms"}  # those of a loaded machine say nothing
    assert [name for name, holds in result["verdicts"].items() if not holds and name not in timely] == []
