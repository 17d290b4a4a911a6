"""An expression compiled for RE2: where it matches in UTF-8, and where a match may begin that the end cuts off."""

from __future__ import annotations

from typing import Any

from alpaca_lora.errors import ConfigError, MachineError
from alpaca_lora.safety.pattern import Pattern

try:
    import re2  # pyright: ignore[reportMissingImports]
except ImportError:
    re2 = None

_MAX_MEMORY = 64 << 20  # of one compiled expression; its search becomes slower, not wrong, when it needs more


class Expression:
    """Searches text for a `Pattern`."""

    def __init__(self, pattern: Pattern, *, case: bool) -> None:
        self.pattern = pattern
        self._reach = 4 * (pattern.most + 1)  # bytes of a match and of the character behind it
        self._core = compiled(pattern.source, case=case)
        self._open = compiled(rf"(?:{pattern.beginnings})\z", case=case)

    def find(self, data: bytes, at: int) -> tuple[int, int] | None:
        """Start and end of the first match that does not begin before ``at``."""
        found = self._core.search(data, at)
        return None if found is None else found.span()

    def first_open(self, data: bytes, at: int) -> int:
        """Where the first match may begin, not before ``at``, that more text could make, change or lengthen."""
        start = max(at, len(data) - self._reach)
        if start > at:
            start = next_character(data, start - 1)
        found = self._open.search(data, start)
        return len(data) if found is None else found.start()


def next_character(data: bytes, at: int) -> int:
    """Where the next character of UTF-8 begins after the byte ``at``."""
    at += 1
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


def compiled(source: str, *, case: bool) -> Any:
    """The expression for RE2, over bytes of UTF-8. ConfigError with RE2's own words for what it does not take;
    MachineError when RE2 is not installed.
    """
    if re2 is None:
        raise MachineError("google-re2 is not installed", fix="pip install 'alpaca-lora[serve]'")
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.case_sensitive = case
    options.log_errors = False
    options.never_capture = True
    try:
        return re2.compile(source.encode(), options)
    except re2.error as error:
        said = error.args[0] if error.args else error
        said = said.decode() if isinstance(said, bytes) else str(said)
        raise ConfigError(f"RE2 does not take the expression: {said[:200]}") from error
