from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from alpaca_lora.errors import UserError
from alpaca_lora.training.lock import NAME, RunLock
from tests.training.tiny_run import in_child


def test_a_live_run_is_refused_with_its_name(tmp_path: Path) -> None:
    ours = rf"pid {os.getpid()}, host {socket.gethostname()}"
    with RunLock(tmp_path), pytest.raises(UserError, match=ours) as error, RunLock(tmp_path):
        pass
    assert error.value.exit_code == 2


def test_it_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path) as lock:
            assert (tmp_path / NAME).exists() and lock.taken_over is None
    assert not (tmp_path / NAME).exists()


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    def child() -> None:
        RunLock(tmp_path).__enter__()
        os.kill(os.getpid(), 9)

    assert in_child(child) == -9
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is not None and lock.taken_over["pid"] != os.getpid()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_reused_pid_does_not_hold_it(tmp_path: Path) -> None:
    """The file names a process that lives, ours; it does not hold the kernel's lock."""
    with RunLock(tmp_path):
        record = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(record)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is not None and lock.taken_over["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_a_torn_file_is_nobodys(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over is None


def test_another_machine_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot_id": "other"}))
    with pytest.raises(UserError, match="pid 7, host elsewhere"), RunLock(tmp_path):
        pass
    assert json.loads((tmp_path / NAME).read_text())["pid"] == 7


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="output_dir"), RunLock(path):
            pass


def test_a_refused_run_leaves_no_folder_but_keeps_one_with_files(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with RunLock(tmp_path / "new"):
        (tmp_path / "new" / "kept").write_text("")
    (tmp_path / "old").mkdir()
    with RunLock(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir() and (tmp_path / "new" / "kept").is_file()
