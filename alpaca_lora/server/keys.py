"""Who may ask: API keys from the environment or a file, compared in constant time, never written anywhere.

An entry is ``KEY`` or ``NAME:KEY``; entries are separated by white space or commas. Keys whose name is ``admin`` or
begins with ``admin-`` may also load and unload adapters. Logs, metrics and limits speak of the names.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alpaca_lora.errors import ConfigError

KEYS_VARIABLE = "ALPACA_LORA_API_KEYS"
MIN_KEY_CHARS = 16
_ENTRY = re.compile(r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,31}):)?(?P<key>[A-Za-z0-9._~+/=-]{1,256})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever asks. tenant: what separates one caller's prefixes from another's in the cache."""

    name: str
    tenant: str = ""
    is_admin: bool = False


ANONYMOUS = Caller("anonymous")  # where there are no keys


class KeyRing:
    """The keys as digests; an empty ring lets everybody in as `ANONYMOUS`."""

    def __init__(self, entries: Iterable[tuple[str | None, str]] = ()) -> None:
        self._callers: dict[bytes, Caller] = {}
        for name, key in entries:
            digest = _digest(key)
            given = name or f"key-{digest.hex()[:8]}"
            is_admin = given == "admin" or given.startswith("admin-")
            self._callers[digest] = Caller(given, digest.hex(), is_admin)

    @classmethod
    def from_text(cls, text: str, source: str) -> KeyRing:
        """ConfigError, naming ``source`` and the entry's number but never the entry."""
        entries: list[tuple[str | None, str]] = []
        for number, word in enumerate(re.split(r"[\s,]+", text.strip()) if text.strip() else [], start=1):
            found = _ENTRY.fullmatch(word)
            if found is None or len(found["key"]) < MIN_KEY_CHARS:
                raise ConfigError(
                    f"entry {number} is no key", field=source,
                    expected=f"KEY or NAME:KEY, the key {MIN_KEY_CHARS} to 256 letters, digits or ._~+/=-",
                )  # fmt: skip
            entries.append((found["name"], found["key"]))
        return cls(entries)

    @classmethod
    def read(cls, file: str | None, environment: Mapping[str, str] = os.environ) -> KeyRing:
        """The keys of the file and those of the environment. ConfigError for a file without keys."""
        text = environment.get(KEYS_VARIABLE, "")
        ring = cls.from_text(text, KEYS_VARIABLE)
        if file is None:
            return ring
        try:
            from_file = cls.from_text(Path(file).read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", field="api_keys_file") from error
        if not from_file:
            raise ConfigError("holds no key", file=file, field="api_keys_file")
        ring._callers |= from_file._callers
        return ring

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, key: str) -> Caller | None:
        """Whose key it is; as long in every case: all are compared, none is left out when one is found."""
        presented = _digest(key)
        found = None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(digest, presented):
                found = caller
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
