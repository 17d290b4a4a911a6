from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from alpaca_lora.errors import MachineError
from alpaca_lora.training import metrics
from alpaca_lora.training.metrics import MetricsLog, open_trackers


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []
        self.fails, self.closed = fails, False

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.seen.append((dict(values), step))

    def close(self) -> None:
        self.closed = True


def test_lines_and_trackers(tmp_path: Path) -> None:
    recorder = Recorder()
    log = MetricsLog(tmp_path / "m.jsonl", trackers=[recorder])
    log.write({"step": 1, "train_loss": 0.1 + 0.2, "note": "text"})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "train_loss": 0.1 + 0.2, "note": "text"}
    assert recorder.seen == [({"train_loss": 0.1 + 0.2}, 1)] and recorder.closed


def test_a_tracker_that_cannot_be_closed_costs_nothing_else(tmp_path: Path) -> None:
    class Stuck(Recorder):
        def close(self) -> None:
            raise ConnectionError("no network")

    said: list[str] = []
    after = Recorder()
    MetricsLog(tmp_path / "m.jsonl", trackers=[Stuck(), after], say=said.append).close()
    assert after.closed and said == ["Stuck could not be closed: no network"]


def test_begins_with_the_checkpoints_lines_and_nothing_after_them(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    log = MetricsLog(path, lines=['{"step": 1}'])
    assert path.read_text() == '{"step": 1}\n'
    log.write({"step": 2})
    assert path.read_text() == log.text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path / "m.jsonl", say=said.append)
    log.write({"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "open", full, raising=False)
    monkeypatch.setattr(metrics, "replace_file", full)
    log.write({"step": 2})
    log.write({"step": 3})
    assert len(said) == 1 and "waits in memory" in said[0]
    monkeypatch.undo()
    log.write({"step": 4})
    assert (tmp_path / "m.jsonl").read_text() == log.text()
    assert [record["step"] for record in log.records()] == [1, 2, 3, 4]


def test_a_broken_tracker_is_told_of_once_and_left(tmp_path: Path) -> None:
    said: list[str] = []
    good = Recorder()
    log = MetricsLog(None, trackers=[Recorder(fails=True), good], say=said.append)
    log.write({"step": 1, "x": 1})
    log.write({"step": 2, "x": 2})
    assert len(said) == 1 and "no network" in said[0]
    assert [step for _, step in good.seen] == [1, 2]


def open_some(folder: Path, report_to: list[str], project: str = "") -> list[metrics.Tracker]:
    return open_trackers(report_to, folder=folder, wandb_project=project, wandb_run_name="", config={})


def test_none_unless_asked_for(tmp_path: Path) -> None:
    assert open_some(tmp_path, []) == []


@pytest.mark.parametrize(("report_to", "project"), [(["wandb"], ""), ([], "a-project")])
def test_a_missing_package_names_its_extra(report_to: list[str], project: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError, match=r"alpaca-lora\[wandb\]"):
        open_some(tmp_path, report_to, project)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = open_some(tmp_path, ["tensorboard", "tensorboard"])
    tracker.log({"train_loss": 1.5}, 3)
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
