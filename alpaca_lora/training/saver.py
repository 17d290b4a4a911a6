"""Saving on a disk that may be full, gone or read-only: training is kept, the save is tried again, and in the end it
stops loudly.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_lora.errors import MachineError
from alpaca_lora.training.checkpoint import Checkpoint, CheckpointStore, Content, size_of

MAX_FAILURES = 5


@dataclass
class Saver:
    """A `CheckpointStore` with patience.

    ``about``: for every manifest. ``write_adapter``: puts the adapter's own files into a folder. After a failed
    `try_save` the next is due 1, 2, 4, 8 steps later; the fifth failure in a row stops the run with a copy in an
    emergency folder.
    """

    store: CheckpointStore
    about: Mapping[str, Any] = field(default_factory=dict)
    write_adapter: Callable[[Path], None] | None = None
    say: Callable[[str], None] = print
    retry_seconds: float = 0.5
    failures: int = 0
    retry_at_step: int | None = None
    last: Checkpoint | None = None

    def is_due(self, step: int) -> bool:
        """Whether an earlier failure asks for another try at ``step``."""
        return self.retry_at_step is not None and step >= self.retry_at_step

    def try_save(self, step: int, files: Mapping[str, Content], pinned: Collection[int] = ()) -> bool:
        """Save; False when the disk refused and training should go on. MachineError after the last failure."""
        try:
            self.last = self.store.save(step, files, about=self.about, write_adapter=self.write_adapter, pinned=pinned)
        except (OSError, MachineError) as refused:
            # the adapter's writer has its own words for a full disk
            error = refused.__cause__ if isinstance(refused, MachineError) else refused
            if not isinstance(error, OSError):
                raise
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise self._give_up(step, files, error) from error
            self.retry_at_step = step + 2 ** (self.failures - 1)
            self.say(
                f"checkpoint-{step} not saved: {self._explain(files, error)}; trying again at step {self.retry_at_step}"
            )
            return False
        self.failures, self.retry_at_step = 0, None
        return True

    def must_save(self, step: int, files: Mapping[str, Content], pinned: Collection[int] = ()) -> None:
        """Save now, at the end of a run or on a signal: no later step will come to try again at."""
        while not self.try_save(step, files, pinned):
            time.sleep(self.retry_seconds * 2**self.failures)

    def _give_up(self, step: int, files: Mapping[str, Content], error: OSError) -> MachineError:
        what = f"checkpoint-{step} could not be saved {MAX_FAILURES} times in a row: {self._explain(files, error)}"
        whose = hashlib.sha256(str(self.store.folder.absolute()).encode()).hexdigest()[:8]
        emergency = Path(tempfile.gettempdir()) / f"alpaca-lora-emergency-{self.store.folder.name}-{whose}"
        try:
            saved = CheckpointStore(emergency).save(step, files, about=self.about, write_adapter=self.write_adapter)
        except (OSError, MachineError) as second:
            kept = f"the last good one is {self.last.path}" if self.last else "no checkpoint exists"
            return MachineError(f"{what}; {emergency} failed as well ({second}); {kept}", fix="make room")
        return MachineError(
            what,
            file=self.store.folder,
            fix=f"go on with --resume_from_checkpoint {saved.path} (saved there instead) and another --output_dir",
        )

    def _explain(self, files: Mapping[str, Content], error: OSError) -> str:
        needed = sum(size_of(content) for content in files.values())
        folder = next(path for path in (self.store.folder, *self.store.folder.absolute().parents) if path.is_dir())
        return f"{error.strerror or error} (needs {needed:,} bytes, {shutil.disk_usage(folder).free:,} free)"
