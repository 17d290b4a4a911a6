"""What the field ``model`` can name: the base model and the bank's adapters, each with its own prompt format.

Knows names, records and templates; reads no weights.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from alpaca_lora.adapters.peft_format import CONFIG_NAME
from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord
from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.server.errors import invalid, of_error, unknown_model
from alpaca_lora.text.tokenizer import Tokenizer


class LoadedAdapter(Protocol):
    """What this room reads of `inference.adapter_bank.LoadedAdapter`."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def record(self) -> AdapterRecord | None: ...
    @property
    def folder(self) -> Path: ...
    @property
    def num_virtual(self) -> int: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def is_resident(self) -> bool: ...


class Bank(Protocol):
    """What this room asks of `inference.adapter_bank.AdapterBank`; every method may be called from any thread."""

    def names(self) -> Sequence[str]: ...
    def get(self, name: str) -> LoadedAdapter: ...
    def load(self, name: str, folder: Path, *, pinned: bool = False) -> LoadedAdapter: ...
    def unload(self, name: str) -> None: ...
    def acquire_resident(self, name: str) -> LoadedAdapter | None: ...
    def acquire(self, name: str) -> LoadedAdapter: ...
    def release(self, adapter: LoadedAdapter) -> None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name. adapter: what the bank calls it, None for the base. prompts: None for a classifier, whose ``labels``
    are its classes. num_virtual: places of the context that its prefix takes. created: seconds since 1970.
    method, rank: of its adapter, where it has them.
    """

    name: str
    adapter: str | None
    prompts: PromptFormat | None
    labels: tuple[str, ...]
    num_virtual: int
    digest: str
    created: int
    method: str | None = None
    rank: int | None = None

    @property
    def writes(self) -> PromptFormat:
        """Its prompt format. ApiError for a classifier."""
        if self.prompts is None:
            raise invalid(f"The model {self.name!r} classifies and writes nothing; ask /v1/classify", "model")
        return self.prompts


class ServedModels:
    """The table of names. ``prompts`` is the base's format, and that of adapters whose folder has no record."""

    def __init__(self, base_name: str, fingerprint: str, prompts: PromptFormat, bank: Bank) -> None:
        self.base_name, self.bank = base_name, bank
        self._prompts = prompts
        self._lock = threading.Lock()
        self._known: dict[str, ServedModel] = {}  # by name; another digest under the same name replaces it
        self._base = ServedModel(base_name, None, prompts, (), 0, fingerprint, int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._prompts.tokenizer

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.tokenizer.token_bytes(index)) for index in range(self.tokenizer.vocab_size))

    @property
    def fingerprint(self) -> str:
        return self._base.digest

    def names(self) -> list[str]:
        return [self.base_name, *sorted(self.bank.names())]

    def all(self) -> list[ServedModel]:
        """Compiles the templates of adapters that were not asked for yet: not for the event loop."""
        return [self._base, *(self.of_adapter(self.bank.get(name)) for name in sorted(self.bank.names()))]

    def find(self, name: str) -> ServedModel:
        """ApiError 404 for a name that is not served; not for the event loop, as `all`."""
        if name == self.base_name:
            return self._base
        if name not in self.bank.names():
            raise unknown_model(name)
        try:
            return self.of_adapter(self.bank.get(name))
        except AlpacaLoraError as error:
            # unloaded since we looked, or a record that cannot be used
            if name not in self.bank.names():
                raise unknown_model(name) from error
            raise of_error(error, param="model") from error

    def of_adapter(self, loaded: LoadedAdapter) -> ServedModel:
        """ModelFileError or AdapterError for a record whose template cannot be used."""
        with self._lock:
            known = self._known.get(loaded.name)
            if known is None or known.digest != loaded.digest:
                known = self._known[loaded.name] = self._made(loaded)
            return known

    def forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)

    def _made(self, loaded: LoadedAdapter) -> ServedModel:
        record = loaded.record
        prompts: PromptFormat | None = self._prompts
        if loaded.labels:
            prompts = None
        elif record is not None and record.template:
            prompts = PromptFormat.from_record(record, self.tokenizer, file=loaded.folder / RECORD_NAME)
        return ServedModel(
            loaded.name, loaded.name, prompts, loaded.labels, loaded.num_virtual, loaded.digest, int(time.time()),
            loaded.method, _rank(loaded.folder),
        )  # fmt: skip


def _rank(folder: Path) -> int | None:
    """The ``r`` of the adapter's configuration; None for a method without ranks."""
    try:
        rank = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("r")
    except (OSError, ValueError, AttributeError):
        return None  # the bank has read and checked it; it was changed since, and this is only for people to see
    return rank if type(rank) is int else None
