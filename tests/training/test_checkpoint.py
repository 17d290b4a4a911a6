"""What a crash, a bad disk or a full one leaves behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.errors import ConfigError, MachineError, ModelFileError
from alpaca_lora.models.attention import Packed
from alpaca_lora.training import durable
from alpaca_lora.training.checkpoint import MANIFEST, Checkpoint, CheckpointStore, verify
from alpaca_lora.training.durable import remove_temporaries
from alpaca_lora.training.saver import MAX_FAILURES, Saver
from alpaca_lora.training.trainer import Trainer
from tests.tiny import tiny_model
from tests.training.tiny_run import digest, in_child, log_in, tiny_trainer

FILES = {"state.json": b"{}", "metrics.jsonl": b"", "training_state.safetensors": bytes(range(256)) * 40}


def store_with(folder: Path, *steps: int, keep: int = 3) -> CheckpointStore:
    store = CheckpointStore(folder, keep=keep)
    for step in steps:
        store.save(step, FILES, about={})
    return store


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes() or b"x")
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


class TestStore:
    def test_what_is_saved_is_verified_and_leaves_no_temporaries(self, tmp_path: Path) -> None:
        store_with(tmp_path, 5)
        assert verify(tmp_path / "checkpoint-5").step == 5
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]

    def test_rotation_keeps_the_newest_and_the_pinned(self, tmp_path: Path) -> None:
        store = store_with(tmp_path, 1, 2, 3)
        store.save(4, FILES, about={}, pinned=[1])
        assert store.steps() == [4, 3, 2, 1]
        store.save(5, FILES, about={}, pinned=[2])
        assert store.steps() == [5, 4, 3, 2]

    def test_a_damaged_one_does_not_count_as_kept(self, tmp_path: Path) -> None:
        store = store_with(tmp_path, 1, 2, keep=1)
        (tmp_path / "checkpoint-2" / "state.json").unlink()
        store.save(3, FILES, about={})
        assert 1 in store.steps()

    def test_the_same_step_again_replaces(self, tmp_path: Path) -> None:
        store = store_with(tmp_path, 1)
        store.save(1, {**FILES, "state.json": b"[]"}, about={})
        assert (tmp_path / "checkpoint-1" / "state.json").read_bytes() == b"[]"
        assert store.steps() == [1]

    def test_an_older_step_than_those_there_survives_its_own_rotation(self, tmp_path: Path) -> None:
        store = store_with(tmp_path, 7, 8, 9)
        store.save(2, FILES, about={})
        assert 2 in store.steps()

    @pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
    @pytest.mark.parametrize("name", ["state.json", "training_state.safetensors", MANIFEST])
    def test_a_damaged_newest_falls_back_and_says_so(self, name: str, how: str, tmp_path: Path) -> None:
        store = store_with(tmp_path, 1, 2)
        spoil(tmp_path / "checkpoint-2" / name, how)
        said: list[str] = []
        newest = store.newest(said.append)
        assert newest is not None and newest.step == 1
        assert len(said) == 1 and "checkpoint-2 is damaged" in said[0] and name in said[0]
        assert (tmp_path / "checkpoint-2.corrupt").is_dir()
        assert store.steps() == [1]

    def test_all_damaged_is_an_error_also_the_second_time(self, tmp_path: Path) -> None:
        store = store_with(tmp_path, 1, 2)
        for step in (1, 2):
            spoil(tmp_path / f"checkpoint-{step}" / "state.json", "flipped")
        for _ in range(2):
            with pytest.raises(ModelFileError, match="every checkpoint is damaged"):
                store.newest(lambda _: None)

    def test_none_yet(self, tmp_path: Path) -> None:
        assert CheckpointStore(tmp_path / "nowhere").newest(print) is None

    def test_a_newer_format_is_refused_and_not_called_damaged(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("alpaca_lora.training.checkpoint.FORMAT_VERSION", 2)
        store = store_with(tmp_path, 1)
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="format 2"):
            store.newest(print)

    def test_a_folder_that_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFileError, match=MANIFEST):
            verify(tmp_path)


class TestFullDisk:
    def test_training_goes_on_and_the_save_is_tried_again(self, tmp_path: Path, monkeypatch) -> None:
        said: list[str] = []
        whole = tiny_trainer(max_steps=8)
        whole.train()
        trainer = tiny_trainer(tmp_path, max_steps=8, say=said.append)
        write, failures = durable.write_file, iter([True, True])

        def full(path: Path, data: bytes):
            if "step-" in str(path) and next(failures, False):
                path.write_bytes(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, data)

        monkeypatch.setattr("alpaca_lora.training.checkpoint.write_file", full)
        trainer.train()
        assert digest(trainer) == digest(whole)
        assert sum("not saved: No space left on device (needs" in line for line in said) == 2
        assert verify(tmp_path / "checkpoint-8").step == 8
        assert not list(tmp_path.glob(".tmp-*"))

    def test_after_the_last_failure_it_stops_with_an_emergency_copy(self, tmp_path: Path, monkeypatch) -> None:
        emergency = tmp_path / "emergency"
        emergency.mkdir()
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(emergency))
        run = tmp_path / "run"
        run.write_text("a file where the folder should be")
        saver = Saver(CheckpointStore(run), say=lambda _: None, retry_seconds=0)
        with pytest.raises(MachineError, match=rf"{MAX_FAILURES} times in a row") as error:
            saver.must_save(3, FILES)
        (saved,) = emergency.glob("alpaca-lora-emergency-run-*/checkpoint-3")
        assert verify(saved).step == 3 and str(saved) in str(error.value)
        assert error.value.exit_code == 4

    def test_a_removed_folder_is_made_again(self, tmp_path: Path) -> None:
        trainer = tiny_trainer(tmp_path / "run")
        for _ in range(2):
            trainer.train_step()
        shutil.rmtree(tmp_path / "run")
        trainer.train()
        assert verify(tmp_path / "run" / "checkpoint-6").step == 6

    def test_a_real_limit_on_file_size(self, tmp_path: Path) -> None:
        """The kernel refuses the write; the earlier checkpoint is intact and the process ends with the reason."""

        def child() -> None:
            trainer = tiny_trainer(tmp_path, max_steps=4)
            for _ in range(2):
                trainer.train_step()
                trainer._evaluate_and_save()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
            try:
                trainer.train()
            except MachineError as error:
                (tmp_path / "reason").write_text(str(error)[:4000])

        assert in_child(child) == 0
        assert "File too large" in (tmp_path / "reason").read_text()
        assert verify(tmp_path / "checkpoint-2").step == 2
        assert not list(tmp_path.glob(".tmp-*"))


class TestKilled:
    """SIGKILL at every call that changes the disk during a save; the resumed run must end as the uninterrupted one."""

    def test_at_every_seam(self, tmp_path: Path) -> None:
        whole = _three_steps(tmp_path / "whole")
        whole.train()
        expected, log = digest(whole), log_in(tmp_path / "whole" / "metrics.jsonl")
        adapter = (tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
        seam, steps_found = 0, set()
        while True:
            run = tmp_path / f"seam-{seam}"
            ended = in_child(lambda run=run, seam=seam: _train_until_killed(run, seam))
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            remove_temporaries(run)
            checkpoint = CheckpointStore(run, keep=2).newest(lambda text: pytest.fail(text))
            steps_found.add(checkpoint.step if checkpoint else None)
            again = _three_steps(run, resume=checkpoint)
            again.train()
            assert digest(again) == expected
            assert log_in(run / "metrics.jsonl") == log
            assert (run / "checkpoint-3" / "adapter_model.safetensors").read_bytes() == adapter
            shutil.rmtree(run)
            seam += 1
        assert seam >= 20
        assert steps_found == {2, 3}


def _three_steps(folder: Path, resume: Checkpoint | None = None) -> Trainer:
    """A checkpoint after each step, of which two are kept: the third save deletes the first."""
    return tiny_trainer(folder, resume=resume, validation=False, max_steps=3, save_steps=1, save_total_limit=2)


def _train_until_killed(folder: Path, seam: int) -> None:
    """Train; die just before the ``seam``-th call to the system that a save makes after the second step."""
    trainer = _three_steps(folder)
    for _ in range(2):
        trainer.train_step()
        trainer._evaluate_and_save()
    calls = 0

    def deadly(real):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == seam:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    real_open = open

    def half_written(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        if "x" in mode and "b" in mode:
            file.write(b"half")
            file.flush()
            deadly(lambda: None)()
            file.seek(0)
            file.truncate()
        return file

    durable.open = half_written  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()


def test_a_checkpoint_is_an_adapter_folder(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    model = tiny_model()
    load_adapter(tmp_path / "checkpoint-6", model)
    ids_T = torch.arange(9)
    trainer.adapter.set_rows(None)
    best = verify(tmp_path / "checkpoint-6").tensors()
    trainer.optimizer.load_weights(trainer.optimizer.flat_weights(best))
    with torch.no_grad():
        assert torch.equal(model(ids_T, ids_T, Packed((9,))), trainer.model(ids_T, ids_T, Packed((9,))))


def test_the_manifest_says_what_the_run_is(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, FILES, about={"config_sha256": "ab"})
    manifest = json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_bytes())
    assert manifest["config_sha256"] == "ab" and set(manifest["files"]) == set(FILES)
