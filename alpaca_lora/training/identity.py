"""What makes two runs the same run: the configuration and inputs that a resumed run must share with its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alpaca_lora.errors import ConfigError, DataError, ModelFileError, UserError

# Keys that may differ on resume. Where to read and write, what to keep and show; and paths whose content has a
# fingerprint of its own. The number of steps is compared as total_steps: the learning rate depends on it, not on how
# it was asked for.
FREE_KEYS = frozenset((
    "output_dir", "resume_from_checkpoint", "fresh", "report_to", "wandb_project", "wandb_run_name",
    "num_sample_answers", "max_memory_gb", "eval_steps", "save_steps", "save_total_limit",
    "early_stopping_patience", "num_epochs", "max_steps", "num_threads", "device", "gradient_checkpointing",
    "micro_batch_size", "data_cache", "base_model", "data_path", "val_data_path", "prompt_template_name", "skip_bad",
))  # fmt: skip


@dataclass(frozen=True)
class RunIdentity:
    """``config``: key -> value, without `FREE_KEYS`. ``fingerprints``: of the base model, template and encoded data.

    ``data_hashes``: data file -> sha256 of its content.
    """

    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    data_hashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, total_steps: int, warmup_steps: int,
        fingerprints: Mapping[str, str], data_hashes: Mapping[str, str],
    ) -> RunIdentity:  # fmt: skip
        """The identity of a run with this whole configuration; the steps are those that the configuration came to."""
        kept = {key: value for key, value in config.items() if key not in FREE_KEYS and key != "warmup_steps"}
        if kept.get("optimizer_state") != "int8":  # on a disk or in memory: the same numbers
            kept.pop("optimizer_state", None)
        return cls(
            {**kept, "total_steps": total_steps, "warmup_steps": warmup_steps}, dict(fingerprints), dict(data_hashes)
        )

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, str]:
        """For a checkpoint's manifest: hashes that tell runs apart at a glance, and how its randomness is drawn."""
        text = json.dumps(self.config, sort_keys=True)
        return {
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "data_fingerprint": self.fingerprints.get("data", ""),
            "randomness": "keyed by seed, step, row, position",
            "world_size": "1",
        }

    def check(self, record: Any, *, file: Path) -> None:
        """Refuse a checkpoint, whose `to_record` is ``record``, of another run: every difference in one message.

        ConfigError for keys (by name, with both values), DataError for data files that changed, UserError for
        another base or template.
        """
        if not isinstance(record, dict) or set(record) != set(self.to_record()):
            raise ModelFileError("does not say which run it belongs to", file=file)
        then: dict[str, Any] = record["config"]
        differing = [
            f"{key}: {_show(then, key)} in the checkpoint, {_show(self.config, key)} now"
            for key in sorted(then.keys() | self.config.keys())
            if (key in then) != (key in self.config) or then.get(key) != _plain(self.config.get(key))
        ]
        if differing:
            raise ConfigError(
                "; ".join(differing), file=file, field="resume_from_checkpoint",
                fix="give the values of the checkpoint, or start anew with --fresh or another output_dir",
            )  # fmt: skip
        self._check_data(record["data_hashes"])
        for name, value in self.fingerprints.items():
            before = record["fingerprints"].get(name)
            if before != value:
                raise (DataError if name == "data" else UserError)(
                    f"the {name} is not the checkpoint's: fingerprint {before} then, {value} now",
                    file=file, field="resume_from_checkpoint",
                    fix=f"resume with the {name} it was trained with, or start anew with --fresh",
                )  # fmt: skip

    def _check_data(self, then: Mapping[str, str]) -> None:
        if sorted(then.values()) == sorted(self.data_hashes.values()):
            return  # the same content, wherever it lies now
        changed = [path for path, digest in self.data_hashes.items() if digest not in then.values()]
        gone = [path for path, digest in then.items() if digest not in self.data_hashes.values()]
        path = (changed or gone or list(self.data_hashes))[0]
        before = then.get(path) or (next(iter(then.values())) if len(then) == 1 else "not given")
        raise DataError(
            f"changed since the checkpoint: sha256 {before[:16]} then, "
            f"{self.data_hashes.get(path, 'not given')[:16]} now",
            file=path, field="data_path", fix="resume with the file as it was, or start anew with --fresh",
        )  # fmt: skip


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "absent"
