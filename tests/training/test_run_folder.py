from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.errors import ConfigError, MachineError, ModelFileError, UserError
from alpaca_lora.training import run_folder
from alpaca_lora.training.checkpoint import Checkpoint, CheckpointStore
from alpaca_lora.training.run_folder import RunFolder
from tests.training.tiny_run import tiny_options


def claim(path: Path, said: list[str] | None = None, **options: object) -> Checkpoint | None:
    return RunFolder(path, (said if said is not None else []).append).claim(tiny_options(path, **options))


def with_run(path: Path) -> Path:
    store = CheckpointStore(path)
    for step in (1, 2):
        store.save(step, {"state.json": b"{}"}, about={})
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


def test_a_new_folder_is_made_and_stays_empty(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b") is None
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_folder_with_a_run_needs_a_word(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run already .*--resume_from_checkpoint auto .*--fresh"):
        claim(with_run(tmp_path))


@pytest.mark.parametrize("sign", ["adapter_model.safetensors", "checkpoint-3.corrupt"])
def test_other_signs_of_a_run(sign: str, tmp_path: Path) -> None:
    (tmp_path / sign).mkdir() if "checkpoint" in sign else (tmp_path / sign).write_text("x")
    with pytest.raises(UserError, match="holds a run"):
        claim(tmp_path)


def test_other_files_and_an_empty_log_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "notes.txt").write_text("mine")
    assert claim(tmp_path) is None


def test_auto_takes_the_newest(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoint = claim(with_run(tmp_path), said, resume_from_checkpoint="auto")
    assert checkpoint is not None and checkpoint.step == 2
    assert "checkpoint-2" in said[-1]


def test_auto_without_a_checkpoint_says_that_it_starts(tmp_path: Path) -> None:
    said: list[str] = []
    assert claim(tmp_path, said, resume_from_checkpoint="auto") is None
    assert "no checkpoint" in said[-1]


def test_auto_does_not_restart_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(ModelFileError, match="finished adapter and no checkpoint"):
        claim(tmp_path, resume_from_checkpoint="auto")


def test_a_path_can_be_a_checkpoint_or_the_folder_of_them(tmp_path: Path) -> None:
    with_run(tmp_path)
    for path, step in ((tmp_path / "checkpoint-1", 1), (tmp_path, 2)):
        checkpoint = claim(tmp_path, resume_from_checkpoint=str(path))
        assert checkpoint is not None and checkpoint.step == step


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint-9: resume_from_checkpoint: no such folder"):
        claim(with_run(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(UserError, match=r"state\.json: resume_from_checkpoint: is not a folder"):
        claim(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2" / "state.json"))
    with pytest.raises(UserError, match="no such folder"):
        claim(tmp_path, resume_from_checkpoint="a" * 300)


def test_a_named_checkpoint_that_is_damaged_is_not_replaced_by_another(tmp_path: Path) -> None:
    (with_run(tmp_path) / "checkpoint-2" / "state.json").write_text("[]")
    with pytest.raises(ModelFileError, match=r"state\.json: damaged or no checkpoint: .*auto for the newest good one"):
        claim(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_into_another_runs_folder_is_refused(tmp_path: Path) -> None:
    with_run(tmp_path / "one")
    with_run(tmp_path / "two")
    with pytest.raises(UserError, match="another run"):
        claim(tmp_path / "two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    assert claim(tmp_path / "three", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1")) is not None


def test_fresh_moves_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    with_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert claim(tmp_path, fresh=True) is None
    RunFolder(tmp_path, lambda _: None).set_aside()
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "previous-1"}
    moved = {path.name for path in (tmp_path / "previous-1").iterdir()}
    assert moved == {"checkpoint-1", "checkpoint-2", "metrics.jsonl"}
    with_run(tmp_path)
    RunFolder(tmp_path, lambda _: None).set_aside()
    assert (tmp_path / "previous-2" / "checkpoint-1").is_dir()


def test_fresh_and_resume_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fresh"):
        claim(tmp_path, fresh=True, resume_from_checkpoint="auto")


def test_what_a_killed_run_left_half_done_is_removed_and_said(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-3-ab" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-metrics.jsonl-ab").write_text("x")
    said: list[str] = []
    claim(tmp_path, said)
    assert not list(tmp_path.iterdir()) and len(said) == 2


def test_no_room_is_said_with_what_is_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "PROBE_BYTES", 1 << 60)
    with pytest.raises(MachineError, match="No space left on device"):
        claim(tmp_path)
