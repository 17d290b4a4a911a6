"""Many adapters on one base: loaded and unloaded while it serves, counted while they are used, within a byte budget.

Each row of a forward has its own adapter or none (`set_rows`). The base is changed nowhere: where a loaded adapter has
something to add, a `BankedLinear` stands in front of the base's linear, and is taken away with the last such adapter.
Knows names, users and bytes; what a folder must hold is `checked_adapter`'s, what is added to a row `banked_linear`'s.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from alpaca_lora.adapters.linear_adapter import check_free, replace
from alpaca_lora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME
from alpaca_lora.adapters.record import RECORD_NAME
from alpaca_lora.device import give_holes_back
from alpaca_lora.errors import AdapterError, MachineError, nearest
from alpaca_lora.inference.banked_linear import BankedLinear, BankRows
from alpaca_lora.inference.checked_adapter import CheckedAdapter, ServedBase
from alpaca_lora.inference.copy_room import CopyRoom
from alpaca_lora.inference.loaded_adapter import LoadedAdapter
from alpaca_lora.models.decoder import CausalLM

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
IDLE_FOR = 64  # uses of any adapters; one that was not among them leaves for copies: to read it again takes many steps
FileState = tuple[tuple[int, int, int] | None, ...]


@dataclass(slots=True)
class _Entry:
    """What a name stands for. state: of the folder's files when they were read."""

    adapter: LoadedAdapter
    folder: Path
    state: FileState
    pinned: bool
    last_used: int


@dataclass(slots=True)
class _Turn:
    """Who reads the folder of a name: one thread at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_threads: int = 0


class AdapterBank:
    """The adapters of one served model. Everything may be called from any thread, beside a running forward; `set_rows`
    from the thread that runs the forward, whose linears read nothing else.

    max_bytes: of all adapters in memory, and of the float32 copies that a thread which runs forwards has of those in
    its steps (`adapter_stack`); None: no limit. Adapters that nobody has used for long leave for copies, copies are
    given up for an adapter that is asked for. base_name: what no adapter may be called. tokenizer_fingerprint: of the
    tokenizer that prompts are made with, compared with the adapters' own.
    """

    def __init__(
        self, model: CausalLM, base_fingerprint: str, *, max_bytes: int | None = None, base_name: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        """AdapterError for a model that carries an adapter of its own."""
        check_free(model)
        self.max_bytes = max_bytes
        self._base, self._base_name = ServedBase(model, base_fingerprint, tokenizer_fingerprint), base_name
        self._lock = threading.Lock()  # of all below; never held while a file is read
        self._copies = CopyRoom(self._lock, lambda num_bytes: self._free_up(num_bytes, idle_for=IDLE_FOR))
        self._rows = BankRows(model.embeddings.weight.device, room=self._copies)
        self._entries: dict[str, _Entry] = {}
        self._users: Counter[LoadedAdapter] = Counter()
        self._retired: set[LoadedAdapter] = set()  # without a name, in use
        self._num_targeting: Counter[str] = Counter()  # linear -> resident adapters that add something to it
        self._reserved = 0  # bytes of adapters that are being read
        self._turns: dict[str, _Turn] = {}
        self._now = 0  # how often adapters were asked for

    # ---- names

    def load(self, name: str, folder: Path, *, pinned: bool = False) -> LoadedAdapter:
        """Read a folder and give it this name; who asks from now on gets it, who uses an older one of the name keeps
        that. ``pinned``: it never leaves for others. Calls that wait for another that reads the same files share it.

        AdapterError for a name that cannot be, or an adapter larger than the budget; MachineError when the adapters in
        use leave no room; else as `CheckedAdapter`. Nothing is left of a load that fails.
        """
        self._check_name(name)
        folder = Path(folder)
        state = _state_of(folder)
        with self._turn(name) as has_waited:
            with self._lock:
                entry = self._entries.get(name)
                if has_waited and entry is not None and (entry.folder, entry.state) == (folder, state):
                    entry.pinned |= pinned
                    if entry.adapter.is_resident:
                        return entry.adapter
            try:
                return self._read(name, folder, pinned=pinned, is_used=False)
            finally:
                give_holes_back()  # of what checking it took, and of whoever left for it

    def unload(self, name: str) -> None:
        """Forget a name; the memory goes with the last user. Waits for a load of the name that is under way.
        AdapterError for an unknown one.
        """
        with self._turn(name), self._lock:
            adapter = self._entry(name).adapter
            del self._entries[name]
            self._retire(adapter)
        give_holes_back()

    def names(self) -> list[str]:
        """Names in the order in which they were first loaded; those that left for others are among them."""
        with self._lock:
            return list(self._entries)

    def get(self, name: str) -> LoadedAdapter:
        """What a name stands for, in memory or not: its record, labels and so on. AdapterError for an unknown one."""
        with self._lock:
            return self._entry(name).adapter

    @property
    def num_bytes(self) -> int:
        """Of all adapters in memory."""
        with self._lock:
            return self._held()

    @property
    def num_copy_bytes(self) -> int:
        """Of the copies of adapters in use."""
        with self._lock:
            return self._copies.num_bytes

    # ---- users

    def acquire(self, name: str) -> LoadedAdapter:
        """The adapter, which stays in memory until it is released as often. One that has left is read again from its
        folder; where that holds another adapter by now, it is that one, with its own digest.

        AdapterError for an unknown name; else as `load`.
        """
        if (adapter := self.acquire_resident(name)) is not None:
            return adapter
        with self._turn(name):
            with self._lock:
                if (adapter := self._used(name)) is not None:
                    return adapter
                entry = self._entry(name)
            return self._read(name, entry.folder, pinned=entry.pinned, is_used=True)

    def acquire_resident(self, name: str) -> LoadedAdapter | None:
        """As `acquire`, without reading a file: None for an adapter that has left. AdapterError for an unknown name."""
        with self._lock:
            return self._used(name)

    def release(self, adapter: LoadedAdapter) -> None:
        """End one use. ValueError for an adapter that is not in use."""
        with self._lock:
            if not self._users[adapter]:
                del self._users[adapter]
                raise ValueError(f"adapter {adapter.name!r} is not in use")
            self._users[adapter] -= 1
            if not self._users[adapter]:
                del self._users[adapter]
                if adapter in self._retired:
                    self._retired.discard(adapter)
                    self._drop(adapter)

    def set_rows(self, rows: Sequence[tuple[LoadedAdapter | None, int]]) -> None:
        """Say whose rows the next forward of this thread has, in stream order: (adapter in use or None for the base,
        number of rows). It holds until the next call.

        ValueError for an adapter that is not in memory; a linear raises it for a stream of another length.
        """
        self._rows.set(rows)

    def select_rows(self, places: Sequence[int]) -> None:
        """Before the head is applied to some rows of the forward only: their places in its stream, in rising order. An
        adapter may sit on the head too.
        """
        self._rows.select(places)

    # ---- inside

    def _check_name(self, name: str) -> None:
        is_base = self._base_name is not None and name.casefold() == self._base_name.casefold()
        if is_base or not NAME.fullmatch(name):
            raise AdapterError(
                "is the name of the base" if is_base else f"bad adapter name {name[:80]!r}", field="name",
                expected="letters, digits, dot, dash and underscore, at most 64, the first a letter or digit",
            )  # fmt: skip

    def _entry(self, name: str) -> _Entry:
        if (entry := self._entries.get(name)) is None:
            alike = nearest(name[:80], list(self._entries)[:200])
            fix = f"did you mean {alike[0]!r}?" if alike else None
            raise AdapterError(f"no adapter {name[:80]!r} is loaded", field="name", fix=fix)
        return entry

    def _used(self, name: str) -> LoadedAdapter | None:
        """The adapter with one user more; None when it must be read first."""
        entry = self._entry(name)
        entry.last_used = self._tick()
        if not entry.adapter.is_resident:
            return None
        self._users[entry.adapter] += 1
        return entry.adapter

    def _tick(self) -> int:
        self._now += 1
        return self._now

    @contextmanager
    def _turn(self, name: str) -> Iterator[bool]:
        """Alone with a name; whether somebody else was before."""
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.num_threads += 1
            has_waited = turn.num_threads > 1
        try:
            with turn.lock:
                yield has_waited
        finally:
            with self._lock:
                turn.num_threads -= 1
                if not turn.num_threads:
                    del self._turns[name]

    def _read(self, name: str, folder: Path, *, pinned: bool, is_used: bool) -> LoadedAdapter:
        state = _state_of(folder)  # before anything is read: what changes later is another state
        checked = CheckedAdapter.check(folder, self._base)
        with self._lock:
            self._make_room(checked)
            self._reserved += checked.num_bytes
        try:
            adapter = checked.read(name, self._rows)
        except BaseException:
            with self._lock:
                self._reserved -= checked.num_bytes
            raise
        with self._lock:
            self._reserved -= checked.num_bytes
            self._put(_Entry(adapter, folder, state, pinned, self._tick()))
            self._users.update([adapter] if is_used else [])
        return adapter

    def _put(self, entry: _Entry) -> None:
        """Give an adapter its name and its places in the model."""
        model, name = self._base.model, entry.adapter.name
        for target in entry.adapter.updates:
            self._num_targeting[target] += 1
            if self._num_targeting[target] == 1:
                replace(model, target, BankedLinear(model.get_submodule(target), target, self._rows))
        before, self._entries[name] = self._entries.get(name), entry
        if before is not None:
            self._retire(before.adapter)

    def _retire(self, adapter: LoadedAdapter) -> None:
        """An adapter that has lost its name."""
        if self._users[adapter]:
            self._retired.add(adapter)
        elif adapter.is_resident:
            self._drop(adapter)

    def _drop(self, adapter: LoadedAdapter) -> None:
        """Take it out of memory and the model; its last forward has ended."""
        model = self._base.model
        for target in adapter.updates:
            self._num_targeting[target] -= 1
            if not self._num_targeting[target]:
                del self._num_targeting[target]
                banked = model.get_submodule(target)
                assert isinstance(banked, BankedLinear)
                replace(model, target, banked.base)
        adapter.leave()

    def _held(self) -> int:
        resident = {entry.adapter for entry in self._entries.values() if entry.adapter.is_resident} | self._retired
        return sum(adapter.num_bytes for adapter in resident)

    def _make_room(self, checked: CheckedAdapter) -> None:
        """Let the least recently used adapters go until one more fits, and the copies where that is not enough."""
        if self.max_bytes is not None and checked.num_bytes > self.max_bytes:
            raise AdapterError(
                f"takes {checked.num_bytes} bytes of memory", file=checked.folder,
                expected=f"at most the {self.max_bytes} bytes that all adapters may take together",
            )  # fmt: skip
        if self._free_up(checked.num_bytes):
            return
        self._copies.clear()
        if not self._free_up(checked.num_bytes):
            raise MachineError(
                f"{self._missing(checked.num_bytes)} bytes are missing: the other adapters are in use or pinned",
                file=checked.folder, fix="wait, unload some, or allow adapters more memory",
            )  # fmt: skip

    def _missing(self, num_bytes: int) -> int:
        """So many bytes are too few for so many more; at most 0: they fit."""
        if self.max_bytes is None:
            return 0
        return self._held() + self._copies.num_bytes + self._reserved + num_bytes - self.max_bytes

    def _free_up(self, num_bytes: int, *, idle_for: int = 0) -> bool:
        """Let the least recently used adapters go until so many bytes fit; none when that would not be enough.
        ``idle_for``: only those that were not among so many that were asked for last.
        """
        missing = self._missing(num_bytes)
        leaving: list[LoadedAdapter] = []
        for entry in sorted(self._entries.values(), key=lambda entry: entry.last_used) if missing > 0 else ():
            if missing <= 0 or entry.last_used > self._now - idle_for:
                break
            if entry.adapter.is_resident and not entry.pinned and not self._users[entry.adapter]:
                leaving.append(entry.adapter)
                missing -= entry.adapter.num_bytes
        if missing > 0:
            return False
        for adapter in leaving:
            self._drop(adapter)
        return True


def _state_of(folder: Path) -> FileState:
    """What tells that the files of a folder are still the ones that were read."""

    def one(path: Path) -> tuple[int, int, int] | None:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # not there, or no name that a file can have: the check says it
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    return tuple(one(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME))
