"""What became of every row: rows in = whole + truncated + dropped by reason. Knows no tokens; encode and prepare
write into it.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from alpaca_lora.data.table import ENDS, IS_TEXT, LABELLED, SPELLS_SPECIAL, TRUNCATED

EVENT_DTYPE = np.dtype([("file", "<i4"), ("line", "<i8"), ("code", "<i4")])
RAW_CHARACTERS = 10_000  # kept of a rejected row
_COUNTERS = (
    "rows_in", "whole", "truncated", "split_texts", "examples", "straddling", "special_text", "ends", "ending",
    "contradictory",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one row. ``action``: dropped, repaired, truncated, split or contradictory."""

    file: str
    line: int
    action: str
    reason: str


@dataclass
class Ledger:
    """Counts per reason, and each event with its file and line.

    rows_in = whole + truncated + sum(dropped): `check` holds it. repaired: rows per cleaning rule (they are kept, and
    counted in whole or truncated as well). split_texts: rows of plain text that became several examples; examples:
    what is trained or validated on. straddling: tokens that reach over a response's border, not supervised.
    special_text: rows whose own text spells a special token (encoded as plain text). ending of ends: kept rows, texts
    left out, whose last response ends with EOS or an end-of-turn token. contradictory: kept labelled rows whose text
    another kept row gives another label.
    """

    files: list[str] = field(default_factory=list)
    rows_in: int = 0
    whole: int = 0
    truncated: int = 0
    split_texts: int = 0
    examples: int = 0
    straddling: int = 0
    special_text: int = 0
    ends: int = 0
    ending: int = 0
    contradictory: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    _codes: list[tuple[str, str]] = field(default_factory=list)
    _events: array[int] = field(default_factory=lambda: array("q"))  # file, line, code; 24 bytes an event

    @property
    def kept(self) -> int:
        return self.whole + self.truncated

    @property
    def end_share(self) -> float:
        """Share of the kept rows (texts left out) that end with EOS or an end-of-turn token; 1 when there are none."""
        return self.ending / self.ends if self.ends else 1.0

    def note(self, file: int, line: int, action: str, reason: str) -> None:
        """Keep one event; counting is the caller's."""
        pair = (action, reason)
        if pair not in self._codes:
            self._codes.append(pair)
        self._events.extend((file, line, self._codes.index(pair)))

    def drop(self, file: int, line: int, reason: str) -> None:
        self.dropped[reason] += 1
        self.note(file, line, "dropped", reason)

    def reject(self, file: int, line: int, message: str, raw: str) -> None:
        """A row that could not be read, passed over because of skip_bad."""
        self.drop(file, line, "bad_row")
        self.rejects.append({"file": self.files[file], "line": line, "error": message, "row": raw[:RAW_CHARACTERS]})

    def check(self) -> None:
        """Raises AssertionError, a defect of ours, when a row was lost or counted twice."""
        total = self.whole + self.truncated + self.dropped.total()
        assert self.rows_in == total, f"ledger: {self.rows_in} rows in, {total} accounted for"

    def events(self) -> Iterator[Event]:
        """In the order of the work: reading first, then what was decided over the whole set."""
        for at in range(0, len(self._events), 3):
            file, line, code = self._events[at : at + 3]
            yield Event(self.files[file], line, *self._codes[code])

    def settle(self, columns_N: np.ndarray) -> None:
        """Count what is kept, from the columns (`table.COLUMNS`) of the examples that are left when all is decided."""
        _, first_N, pieces_N = np.unique(columns_N["row"], return_index=True, return_counts=True)
        rows = columns_N[first_N]
        self.truncated = int(np.count_nonzero(rows["flags"] & TRUNCATED))
        self.whole = len(rows) - self.truncated
        self.split_texts = int(np.count_nonzero(pieces_N > 1))
        self.examples = len(columns_N)
        self.straddling = int(rows["straddling"].sum(dtype=np.int64))
        self.special_text = int(np.count_nonzero(rows["flags"] & SPELLS_SPECIAL))
        self.ends = int(np.count_nonzero(rows["flags"] & (IS_TEXT | LABELLED) == 0))
        self.ending = int(np.count_nonzero(rows["flags"] & ENDS))

    def joined(self, other: Ledger) -> Ledger:
        """Both ledgers as one: the training files' and the validation files'."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTERS}
        both = Ledger(
            files=[*self.files, *other.files],
            dropped=self.dropped + other.dropped,
            repaired=self.repaired + other.repaired,
            rejects=[*self.rejects, *other.rejects],
            _codes=list(self._codes),
            _events=array("q", self._events),
            **sums,
        )
        for at in range(0, len(other._events), 3):
            file, line, code = other._events[at : at + 3]
            both.note(file + len(self.files), line, *other._codes[code])
        return both

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, how many, note) for people, top to bottom; the parts of `rows in` first."""
        lines = [("rows in", self.rows_in, ""), ("kept whole", self.whole, "")]
        if self.truncated:
            lines.append(("kept, truncated", self.truncated, "cut at cutoff_len" + ", no EOS" * bool(self.ends)))
        lines += [(f"dropped: {reason}", count, "") for reason, count in self.dropped.most_common()]
        lines += [
            (f"repaired: {rule}", count, "of the kept and dropped") for rule, count in self.repaired.most_common()
        ]
        if self.split_texts:
            lines.append(
                ("texts in pieces", self.split_texts, f"of cutoff_len tokens: {self.examples:,} examples in all")
            )
        if self.contradictory:
            lines.append(("contradictory", self.contradictory, "same text, other label: kept"))
        if self.special_text:
            lines.append(
                ("special-token text", self.special_text, "rows that spell a special token: encoded as plain text")
            )
        if self.straddling:
            lines.append(("straddling tokens", self.straddling, "over a response's border, not learned"))
        return lines

    def table(self) -> Table:
        """`rows` as a table of rich."""
        table = Table(title="rows", title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column(style="dim")
        for what, count, note in self.rows():
            table.add_row(what, f"{count:,}", note)
        return table

    def write(self, folder: Path) -> list[Path]:
        """``ledger.jsonl`` (one event a line, after a line of totals) and, if rows were rejected, ``rejects.jsonl``."""
        totals = {"action": "totals", **self.to_record(), "files": self.files}
        events = ({"file": e.file, "line": e.line, "action": e.action, "reason": e.reason} for e in self.events())
        written = [_write_lines(folder / "ledger.jsonl", [totals], events)]
        if self.rejects:
            written.append(_write_lines(folder / "rejects.jsonl", self.rejects, iter(())))
        return written

    def to_record(self) -> dict[str, Any]:
        """The counts as JSON; `from_record` and `event_array` bring a ledger back."""
        counts = {name: getattr(self, name) for name in _COUNTERS}
        return {**counts, "dropped": dict(self.dropped), "repaired": dict(self.repaired)}

    def event_array(self) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """(events of EVENT_DTYPE, the (action, reason) of each code)."""
        triples = np.asarray(self._events, dtype=np.int64).reshape(-1, 3)
        events = np.empty(len(triples), EVENT_DTYPE)
        events["file"], events["line"], events["code"] = triples.T
        return events, list(self._codes)

    @classmethod
    def from_record(
        cls,
        record: dict[str, Any],
        files: Sequence[str],
        rejects: list[dict[str, Any]],
        events: np.ndarray,
        codes: Sequence[Sequence[str]],
    ) -> Ledger:
        triples = np.stack([events[name].astype(np.int64) for name in ("file", "line", "code")], axis=1)
        return cls(
            files=list(files),
            **{name: int(record[name]) for name in _COUNTERS},
            dropped=Counter(record["dropped"]),
            repaired=Counter(record["repaired"]),
            rejects=list(rejects),
            _codes=[(a, r) for a, r in codes],
            _events=array("q", triples.reshape(-1).tobytes()),
        )


def _write_lines(path: Path, head: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        for one in head:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
        for one in rest:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return path
