"""Counts and events of rows."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alpaca_lora.data.ledger import Event, Ledger
from alpaca_lora.data.table import COLUMNS, ENDS, IS_TEXT, SPELLS_SPECIAL, TRUNCATED


def filled() -> Ledger:
    ledger = Ledger(files=["a.json"], rows_in=6)
    ledger.drop(0, 4, "empty_output")
    ledger.reject(0, 9, "a.json:9: not JSON", '{"x')
    ledger.repaired["noinput"] += 1
    ledger.note(0, 5, "repaired", "noinput")
    columns = np.zeros(6, COLUMNS)
    columns["row"] = [0, 1, 2, 2, 2, 5]  # row 2 is a text in three pieces
    columns["flags"] = [ENDS, TRUNCATED, IS_TEXT, IS_TEXT, IS_TEXT, ENDS | SPELLS_SPECIAL]
    columns["straddling"] = [1, 0, 0, 0, 0, 2]
    ledger.settle(columns)
    return ledger


def test_rows_in_are_all_accounted_for() -> None:
    ledger = filled()
    ledger.check()
    assert (ledger.whole, ledger.truncated, ledger.kept, ledger.examples) == (3, 1, 4, 6)
    assert (ledger.split_texts, ledger.straddling, ledger.special_text) == (1, 3, 1)
    assert ledger.end_share == pytest.approx(2 / 3)
    ledger.rows_in += 1
    with pytest.raises(AssertionError, match="7 rows in, 6 accounted for"):
        ledger.check()


def test_events_lead_back_to_the_lines() -> None:
    assert list(filled().events()) == [
        Event("a.json", 4, "dropped", "empty_output"),
        Event("a.json", 9, "dropped", "bad_row"),
        Event("a.json", 5, "repaired", "noinput"),
    ]


def test_it_is_written_as_lines(tmp_path: Path) -> None:
    written = filled().write(tmp_path)
    assert [path.name for path in written] == ["ledger.jsonl", "rejects.jsonl"]
    head, *events = [json.loads(line) for line in written[0].read_text().splitlines()]
    assert head["rows_in"] == 6 and head["dropped"] == {"empty_output": 1, "bad_row": 1}
    assert events[0] == {"file": "a.json", "line": 4, "action": "dropped", "reason": "empty_output"}
    assert json.loads(written[1].read_text()) == {
        "file": "a.json", "line": 9, "error": "a.json:9: not JSON", "row": '{"x',
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "rejects.jsonl"]


def test_it_comes_back_from_its_record() -> None:
    ledger = filled()
    events, codes = ledger.event_array()
    record = json.loads(json.dumps(ledger.to_record()))
    back = Ledger.from_record(record, ["moved.json"], ledger.rejects, events, json.loads(json.dumps(codes)))
    assert back.rows() == ledger.rows()
    assert [event.line for event in back.events()] == [4, 9, 5] and next(back.events()).file == "moved.json"


def test_two_become_one() -> None:
    both = filled().joined(Ledger(files=["b.json"], rows_in=1))
    other = Ledger(files=["b.json"], rows_in=2, whole=1)
    other.drop(0, 3, "noinput")
    both = filled().joined(other)
    both.check()
    assert both.rows_in == 8 and both.dropped["noinput"] == 1
    assert list(both.events())[-1] == Event("b.json", 3, "dropped", "noinput")


def test_people_see_a_table() -> None:
    console = Console(file=StringIO(), width=100)
    console.print(filled().table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("rows in", "kept whole", "kept, truncated", "dropped: empty_output", "dropped: bad_row", "straddling"):
        assert word in shown
