"""`alpaca-lora combine`: several LoRA folders of one base model -> one, without loading the base."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alpaca_lora.adapters.combine import Combination
from alpaca_lora.adapters.combined_folder import Combined, combine_folders
from alpaca_lora.adapters.merge import check_free
from alpaca_lora.commands.schemas import CombineConfig
from alpaca_lora.config import Resolved
from alpaca_lora.errors import ConfigError

AGAINST = -0.1  # a mean cosine below it is said to be a conflict


def run(config: CombineConfig, *, resolved: Resolved[CombineConfig], console: Console) -> dict[str, Any]:
    """Returns combination combination_weights num_modules min_rank max_rank norm distance cosines output_dir
    seconds.
    """
    start = time.perf_counter()
    num = len(config.lora_weights)
    weights = config.combination_weights or [1 / num] * num
    if len(weights) != num:
        raise ConfigError(
            f"{len(weights)} weights for {num} adapters", field="combination_weights", expected="one for each"
        )
    how = Combination(
        config.combination, config.density, config.majority_sign_method, svd_rank=config.svd_rank, seed=config.seed
    )
    check_free(config.output_dir)
    made = combine_folders(config.lora_weights, weights, how, config.output_dir)
    for message in made.messages:
        console.print(message, markup=False, highlight=False)
    _show(made, config, weights, console)
    lowest, highest = made.ranks
    return {
        "combination": config.combination, "combination_weights": list(weights), "num_modules": made.num_modules,
        "min_rank": lowest, "max_rank": highest, "norm": made.overlap.norm, "distance": _finite(made.overlap.distance),
        "cosines": [[_finite(cosine) for cosine in row] for row in made.overlap.cosines],
        "output_dir": str(made.folder), "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _show(made: Combined, config: CombineConfig, weights: list[float], console: Console) -> None:
    """Each input with its size and how it lies to the others and to the result; then the result."""
    measured, num = made.overlap, len(weights)
    table = Table(title="updates", title_justify="left", box=None, pad_edge=False)
    headings = ("", "adapter", "weight", "norm", "share", "in the result", *(f"cos {n + 1}" for n in range(num)))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "adapter" else "right", overflow="fold")
    for n, folder in enumerate(config.lora_weights):
        cosines = [" " if m == n else _cosine(measured.cosines[n][m]) for m in range(num)]
        figures = (f"{weights[n]:.3g}", f"{measured.norms[n]:.4g}", f"{measured.shares[n]:.0%}")
        table.add_row(str(n + 1), folder, *figures, _cosine(measured.kept[n]), *cosines)
    console.print(table, highlight=False, markup=False)
    lowest, highest = made.ranks
    ranks = f"rank {highest}" if lowest == highest else f"ranks {lowest} to {highest}"
    far = f"{measured.distance:.1%} away from the weighted sum" if measured.distance > 1e-5 else "the weighted sum"
    far = far if math.isfinite(measured.distance) else "the weighted sum itself is zero"
    console.print(
        f"{config.combination}: {made.num_modules} modules, {ranks}, norm {measured.norm:.4g}, {far}\n"
        "norm: of the whole update; share: of the weighted norms; in the result, cos: cosines, 1 the same direction, "
        "0 independent, -1 opposite",
        highlight=False, markup=False,
    )  # fmt: skip
    for one in range(num):
        for other in range(one):
            if measured.cosines[one][other] * weights[one] * weights[other] < AGAINST * abs(
                weights[one] * weights[other]
            ):
                names = " and ".join(Path(config.lora_weights[n]).name for n in (other, one))
                console.print(
                    f"{names} work against each other (mean cosine {measured.cosines[one][other]:.2f}): "
                    "the sum takes away from both; ties or lower weights may keep more",
                    highlight=False, markup=False,
                )  # fmt: skip
    console.print(f"written: {made.folder}", highlight=False, markup=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
