"""Where a run stands: all that is not a tensor and not configuration. Plain numbers, so that it goes through JSON
unchanged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from alpaca_lora.errors import ModelFileError


@dataclass
class TrainState:
    """``step`` counts completed optimizer steps; counts of examples and tokens are over the whole run, resumed parts
    included.

    ``seconds``: of the training loop alone, evaluation and saving left out. ``loss_sum`` is the supervised tokens'
    summed loss, so ``train_loss`` is the mean over the run. ``evaluated_step``: the last step whose evaluation is in
    the log (a signal may come in the middle of one). ``best_*``: of the best step as `Judge.rank` has it (its loss,
    or its accuracy); figures are what the judge measures besides the loss. ``max_tokens``: micro-batch limit after
    memory ran out.
    """

    step: int = 0
    epoch: float = 0.0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    last_loss: float | None = None
    seconds: float = 0.0
    val_loss: float | None = None
    val_figures: dict[str, Any] = field(default_factory=dict)
    best_val_loss: float | None = None
    best_figures: dict[str, Any] = field(default_factory=dict)
    best_rank: list[float] | None = None
    best_step: int | None = None
    evaluated_step: int = 0
    evaluations_since_best: int = 0
    stopped_early: bool = False
    max_tokens: int | None = None

    @property
    def train_loss(self) -> float | None:
        return self.loss_sum / self.supervised_tokens if self.supervised_tokens else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any], *, file: Path) -> TrainState:
        """Take back `to_record`; ModelFileError when the keys are not those of this version."""
        known = {one.name for one in fields(cls)}
        if set(record) != known:
            odd = ", ".join(sorted(set(record) ^ known))
            raise ModelFileError(
                f"keys missing or unknown: {odd}", file=file, expected="a state written by this version"
            )
        return cls(**record)
