"""The method report: what was trained, how far it went, and that the numbers are those of the run."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from alpaca_lora.training.method_report import MethodReport
from tests.tiny import tiny_model
from tests.training.tiny_run import tiny_trainer

NUM_BASE = tiny_model().num_parameters()


def report_of(**adapter: Any) -> tuple[MethodReport, Any]:
    trainer = tiny_trainer(adapter=adapter, validation=False)
    trainer.train()
    return MethodReport.of(trainer.adapter, NUM_BASE), trainer.adapter


def test_what_was_trained_is_counted_before_it_shrinks() -> None:
    report, adapter = report_of(
        method="adalora", adalora_init_r=5, lora_r=2, adalora_tinit=1, adalora_tfinal=2,
        lora_target_modules=["all-linear"],
    )  # fmt: skip
    sizes = [layer.in_features + layer.out_features + 1 for layer in adapter.layers.values()]
    left = sum(size * layer.rank for size, layer in zip(sizes, adapter.layers.values(), strict=True))
    assert report.num_started == 5 * sum(sizes) and report.num_trained == left < report.num_started
    line = dict(report.lines())["trained parameters"]
    assert line.startswith(f"{report.num_started:,} (") and line.endswith(
        f"of the base's {NUM_BASE:,}), {left:,} of them left at the end"
    )
    assert report.to_json()["trained_parameters"] == report.num_started
    assert report.to_json()["trained_parameters_at_the_end"] == left
    plain, _ = report_of(method="lora")
    assert plain.num_started == plain.num_trained and "left" not in dict(plain.lines())["trained parameters"]


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        ({"method": "lora"}, {"lora_A", "lora_B"}), ({"method": "dora"}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
        ({"method": "ia3", "lora_target_modules": ["k_proj", "down_proj"]}, {"ia3_l"}),
        (
            {"method": "adalora", "adalora_init_r": 5, "lora_r": 3, "adalora_tinit": 1, "adalora_tfinal": 2},
            {"lora_A", "lora_B", "lora_E"},
        ),
        ({"method": "prompt", "num_virtual_tokens": 3}, {"prompt_embeddings"}), ({"method": "freeze"}, set()),
    ],
)  # fmt: skip
def test_norms_of_the_parts_at_the_start_and_at_the_end(adapter: dict[str, Any], parts: set[str]) -> None:
    report, trained = report_of(**adapter)
    found = json.loads(json.dumps(report.to_json()))["norms"]
    assert {part for kind in found.values() for part in kind} == parts
    for kind, by_part in found.items():
        for part, norms in by_part.items():
            now = [
                float(p.detach().norm()) for m, n, p in trained.parts() if m.rpartition(".")[2] == kind and n == part
            ]
            assert norms["end"] == pytest.approx(sum(now) / len(now), rel=1e-5) and norms["start"] != norms["end"]
            assert (norms["start"] == 0) == (
                part in ("lora_E",) or (part == "lora_B" and adapter["method"] != "adalora")
            )


def test_an_adapter_that_was_never_begun_has_no_start() -> None:
    trainer = tiny_trainer(validation=False)
    trainer.train()
    trainer.adapter.movement = None
    report = MethodReport.of(trainer.adapter, NUM_BASE)
    assert all(norms["start"] is None and norms["end"] > 0 for norms in report.parts()["q_proj"].values())


def test_the_table_has_the_kinds_of_modules_and_every_number_is_one() -> None:
    report, adapter = report_of(method="lora", lora_target_modules=["all-linear"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [kind for kind, *_ in report.kinds()] and len(lines) == 8
    moved = report.to_json()["moved"]["q_proj"]
    norms = [norm for name, norm in adapter.moved().items() if name.endswith("q_proj")]
    assert moved == {"modules": 2, "min": min(norms), "mean": sum(norms) / 2, "max": max(norms)}
    assert all(math.isfinite(norm) for norm in norms) and report.headline().startswith("lora: trained parameters ")
