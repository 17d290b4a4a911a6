"""The exceptions a user can meet, and the exit code of each.

    AlpacaLoraError                     (never raised itself)
    ├── UserError              2        a wrong flag, path or combination
    │   ├── ConfigError        2        a key or value of the configuration
    │   └── AdapterError       2        an adapter that does not fit: wrong base, wrong targets, wrong keys
    ├── DataError              3        the content of a data file
    │   └── ModelFileError     3        the content of a weight, tokenizer, adapter or checkpoint file
    ├── MachineError           4        memory, disk, missing package, network
    ├── NumericalError         5        a loss, gradient or weight that is not finite
    └── Stopped          130/143        SIGINT or SIGTERM, after the state was saved

Everything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike


class AlpacaLoraError(Exception):
    """One message, ``file:line: field: what, expected, what to do``; parts that are not known are left out."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | PathLike[str] | None = None,
        line: int | None = None,
        field: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.file, self.line, self.field = what, file, line, field
        self.expected, self.fix = expected, fix
        where = "" if file is None else f"{file}:{line}: " if line is not None else f"{file}: "
        if file is None and line is not None:
            where = f"line {line}: "
        subject = f"{field}: " if field else ""
        tail = "".join(f", {part}" for part in (f"expected {expected}" if expected else None, fix) if part)
        super().__init__(f"{where}{subject}{what}{tail}")


class UserError(AlpacaLoraError):
    """A wrong flag, path or combination."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of the configuration."""


class AdapterError(UserError):
    """An adapter that does not fit its base, its targets or its file format."""


class DataError(AlpacaLoraError):
    """The content of a data file."""

    exit_code = 3


class ModelFileError(DataError):
    """The content of a weight, tokenizer, adapter or checkpoint file."""


class MachineError(AlpacaLoraError):
    """Memory, disk, a missing package, the network."""

    exit_code = 4


class NumericalError(AlpacaLoraError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 5


class Stopped(AlpacaLoraError):
    """A signal ended the run after its state was saved; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(what)
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str], *, count: int = 1) -> list[str]:
    """The ``count`` names of ``known`` most like ``name``, whatever the case; empty when none is alike. For "did you
    mean" hints.
    """
    spelled = {one.lower(): one for one in reversed(list(known))}
    return [spelled[found] for found in difflib.get_close_matches(name.lower(), list(spelled), n=count, cutoff=0.5)]
