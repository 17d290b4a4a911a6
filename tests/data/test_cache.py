"""Cache entries: whole or not there, checked byte by byte."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from alpaca_lora.data.cache import DamagedEntry, EntryWriter, entry_key, open_entry, remove_entry
from alpaca_lora.data.ledger import Ledger
from alpaca_lora.data.table import ExampleTable

PARTS = ("tokens.i32", "supervised.u1", "examples.bin", "events.bin", "meta.json", "MANIFEST.json")


def write_entry(folder: Path) -> Path:
    ledger = Ledger(files=["a.json"], rows_in=3)
    ledger.drop(0, 2, "empty_output")
    with EntryWriter(folder) as writer:
        for number, ids in enumerate(([1, 2, 3], [4, 5])):
            ids_T = np.array(ids, dtype=np.int32)
            columns = (number + 1, number, 7, 8, len(ids), len(ids) - 1, 0, 0, 0, -1)
            writer.append([ids_T], [ids_T > ids[0]], [columns])
        writer.finish(ledger, {"notes": ["n"]})
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write_entry(tmp_path / "key")
    for in_memory in (False, True):
        rows, ledger, meta = open_entry(folder, ["b.json"], in_memory=in_memory)
        assert isinstance(rows.ids_T, np.memmap) != in_memory
        table = ExampleTable(rows, np.arange(2))
        assert [one.ids_T.tolist() for one in table] == [[1, 2, 3], [4, 5]]
        assert [one.supervised_T.tolist() for one in table] == [[False, True, True], [False, True]]
        assert table.num_supervised.tolist() == [2, 1] and table.origin(1) == (0, 2)
        assert ledger.dropped == {"empty_output": 1} and next(ledger.events()).file == "b.json"
        assert meta["notes"] == ["n"]
    assert sorted(os.listdir(tmp_path)) == ["key"] and sorted(os.listdir(folder)) == sorted(PARTS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "empty"])
def test_damage_is_seen(tmp_path: Path, part: str, damage: str) -> None:
    folder = write_entry(tmp_path / "key")
    path = folder / part
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else b"")
    with pytest.raises(DamagedEntry):
        open_entry(folder, ["a.json"])
    remove_entry(folder)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), EntryWriter(tmp_path / "key") as writer:
        writer.append([np.array([1], np.int32)], [np.array([True])], [(1, 0, 7, 8, 1, 1, 0, 0, 0, -1)])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        open_entry(tmp_path / "key", [])


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    with EntryWriter(tmp_path / "key") as slow:
        before = write_entry(tmp_path / "key")
        inode = (before / "MANIFEST.json").stat().st_ino
        slow.finish(Ledger(files=["a.json"]), {})
    assert (tmp_path / "key" / "MANIFEST.json").stat().st_ino == inode
    assert sorted(os.listdir(tmp_path)) == ["key"]


def test_old_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    for name, age in ((".tmp-old", 2 * 24 * 3600), (".tmp-new", 60)):
        (tmp_path / name).mkdir()
        time = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (time, time))
    write_entry(tmp_path / "key")
    assert sorted(os.listdir(tmp_path)) == [".tmp-new", "key"]


def test_the_key_is_a_hash_of_everything() -> None:
    assert entry_key({"a": 1, "b": [2]}) == entry_key({"b": [2], "a": 1})
    assert len({entry_key({"a": 1}), entry_key({"a": 2}), entry_key({"b": 1}), entry_key({"a": "1"})}) == 4


def test_nothing_written_is_a_pickle(tmp_path: Path) -> None:
    folder = write_entry(tmp_path / "key")
    assert json.loads((folder / "meta.json").read_text())["ledger"]["rows_in"] == 3
    assert (folder / "tokens.i32").read_bytes() == np.array([1, 2, 3, 4, 5], "<i4").tobytes()
