"""The command from its words to its exit code and its files, on a tiny model folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from alpaca_lora.cli import main
from alpaca_lora.training.checkpoint import CheckpointStore, verify
from alpaca_lora.weights.huggingface import write_folder
from tests.tiny import SPECIAL, tiny_model
from tests.training.tiny_run import log_in

FIGURES = {
    "steps", "examples", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes", "train_loss",
    "val_loss", "best_val_loss", "seconds", "output_dir",
}  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    path = tmp_path_factory.mktemp("base") / "tiny"
    return write_folder(path, model.named_parameters(), model.config.to_hf(), tokenizer_saver=save_tokenizer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    content = [
        {"instruction": f"Say the number {i}", "input": "", "output": f"It is {i * i} or so, {'very ' * (i % 7)}good."}
        for i in range(24)
    ]
    path.write_text("\n".join(json.dumps(row) for row in content))
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_LORA_HOME", str(tmp_path / "home"))


def words(base: Path, rows: Path, output: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "base_model": base, "data_path": rows, "output_dir": output, "dtype": "float32", "device": "cpu",
        "num_threads": 1, "max_steps": 6, "batch_size": 4, "micro_batch_size": 1, "cutoff_len": 256, "val_set_size": 4,
        "eval_steps": 2, "save_steps": 2, "learning_rate": 0.01, "lora_r": 4, **options,
    }  # fmt: skip
    return ["finetune", *(f"--{key}={value}" for key, value in settings.items()), "--json"]


class Command:
    """Runs the command in this process and keeps what it printed."""

    def __init__(self, base: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self.rows, self.capsys = base, rows, capsys

    def __call__(self, output: Path, **options: Any) -> tuple[int, dict[str, Any], str]:
        code = main(words(self.base, self.rows, output, **options))
        printed = self.capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err


@pytest.fixture
def finetune(base: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(base, rows, capsys)


def test_a_run_ends_with_figures_and_a_complete_folder(finetune: Command, tmp_path: Path) -> None:
    code, result, shown = finetune(tmp_path / "out")
    assert code == 0
    assert set(result) >= FIGURES
    assert result["steps"] == 6 and result["examples"] == 24 and result["tokens"] >= result["supervised_tokens"] > 0
    assert result["best_val_loss"] <= result["val_loss"] < 6
    folder = tmp_path / "out"
    record = json.loads((folder / "alpaca_lora.json").read_text())
    assert record["metrics"]["best_val_loss"] == result["best_val_loss"]
    assert record["template"] and record["data_hashes"] and record["config"]["lora_r"] == 4
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.yml", "metrics.jsonl", "ledger.jsonl"):
        assert (folder / name).is_file(), name
    assert not list(folder.glob(".*"))
    assert "learning_rate: 0.01  # flag" in (folder / "config.yml").read_text()
    assert "rows in" in shown and "step 6/6" in shown


def test_without_validation_the_report_answers_without_dropout(finetune: Command, tmp_path: Path) -> None:
    """The last micro-batch's dropout keys must not meet the samples' prompts."""
    code, _, shown = finetune(tmp_path / "out", val_set_size=0, lora_dropout=0.5, num_sample_answers=2)
    assert code == 0 and "report: " in shown
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("the model's answer") == 2


def test_a_report_that_fails_does_not_fail_the_run(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("alpaca_lora.commands.run_report.write_report", full)
    code, _, shown = finetune(tmp_path / "out")
    assert code == 0 and "report.html was not written: OSError: no room" in shown
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_rows_longer_than_the_models_context_are_told_of(finetune: Command, tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=32)
    short = write_folder(
        tmp_path / "short", model.named_parameters(), model.config.to_hf(), tokenizer_saver=save_tokenizer
    )
    code, _, shown = finetune(tmp_path / "out", base_model=short)
    assert code == 0 and "the model's context is 32" in shown


def test_the_best_weights_are_the_ones_saved(finetune: Command, tmp_path: Path) -> None:
    diverging = {"learning_rate": 30.0, "lr_scheduler_type": "constant", "save_total_limit": 9}
    code, result, _ = finetune(tmp_path / "out", eval_steps=1, **diverging)
    assert code == 0
    assert result["best_val_loss"] < result["val_loss"]
    best = json.loads((tmp_path / "out" / "alpaca_lora.json").read_text())["metrics"]["best_step"]
    saved = tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert saved.read_bytes() == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_adapter(finetune: Command, tmp_path: Path) -> None:
    adapters = []
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        assert finetune(tmp_path / name, seed=seed, max_steps=2)[0] == 0
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_a_killed_run_goes_on_to_the_same_adapter(
    finetune: Command, base: Path, rows: Path, tmp_path: Path
) -> None:  # fmt: skip
    options: dict[str, Any] = {"max_steps": 40, "save_steps": 3, "eval_steps": 5}
    assert finetune(tmp_path / "whole", **options)[0] == 0
    cut = tmp_path / "cut"
    process = _start(words(base, rows, cut, **options), tmp_path)
    _wait_for_step(process, cut, 7)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    code, result, shown = finetune(cut, **options, resume_from_checkpoint="auto")
    assert code == 0 and result["steps"] == 40
    assert "resuming from" in shown
    one, two = ((folder / "adapter_model.safetensors").read_bytes() for folder in (cut, tmp_path / "whole"))
    assert one == two
    assert log_in(cut / "metrics.jsonl") == log_in(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, base: Path, rows: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}
    process = _start(words(base, rows, tmp_path / "out", **options), tmp_path)
    _wait_for_step(process, tmp_path / "out", 3)
    process.send_signal(number)
    assert process.wait() == code
    checkpoint = CheckpointStore(tmp_path / "out").newest(print)
    assert checkpoint is not None and checkpoint.step >= 3
    assert f"--resume_from_checkpoint {checkpoint.path}" in (tmp_path / "printed").read_text()
    assert not list((tmp_path / "out").glob(".*"))


class TestRefused:
    def test_a_finished_folder(self, finetune: Command, tmp_path: Path) -> None:
        assert finetune(tmp_path / "out", max_steps=2)[0] == 0
        before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        code, result, _ = finetune(tmp_path / "out", max_steps=2)
        assert code == 2 and "--fresh" in result["error"]["message"]
        assert finetune(tmp_path / "out", max_steps=2, resume_from_checkpoint="auto")[0] == 0
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
        assert finetune(tmp_path / "out", max_steps=2, seed=1, fresh="true")[0] == 0
        assert (tmp_path / "out" / "previous-1" / "adapter_model.safetensors").read_bytes() == before

    def test_changed_settings_and_data_on_resume(self, finetune: Command, rows: Path, tmp_path: Path) -> None:
        assert finetune(tmp_path / "out", max_steps=2)[0] == 0
        log = (tmp_path / "out" / "metrics.jsonl").read_bytes()
        again = {"max_steps": 2, "resume_from_checkpoint": "auto"}
        code, result, _ = finetune(tmp_path / "out", **again, batch_size=2, seed=1)
        assert code == 2
        assert "batch_size: 4 in the checkpoint, 2 now" in result["error"]["message"]
        assert "seed: 42 in the checkpoint, 1 now" in result["error"]["message"]
        edited = tmp_path / "rows.jsonl"
        edited.write_text(rows.read_text().replace("good", "bad", 1))
        code, result, _ = finetune(tmp_path / "out", **again, data_path=edited)
        assert code == 3 and str(edited) in result["error"]["message"] and "sha256" in result["error"]["message"]
        assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == log

    def test_a_missing_checkpoint(self, finetune: Command, tmp_path: Path) -> None:
        code, result, _ = finetune(tmp_path / "out", resume_from_checkpoint=tmp_path / "nothing")
        assert code == 2 and "nothing" in result["error"]["message"]

    def test_a_damaged_checkpoint_falls_back(self, finetune: Command, tmp_path: Path) -> None:
        assert finetune(tmp_path / "out", eval_steps=100)[0] == 0
        adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        (tmp_path / "out" / "checkpoint-6" / "training_state.safetensors").write_bytes(b"short")
        code, _, shown = finetune(tmp_path / "out", eval_steps=100, resume_from_checkpoint="auto")
        assert code == 0 and "checkpoint-6 is damaged" in shown and "checkpoint-4 (step 4)" in shown
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter
        for step in (2, 4, 6):
            (tmp_path / "out" / f"checkpoint-{step}" / "state.json").write_bytes(b"{}")
        code, result, _ = finetune(tmp_path / "out", eval_steps=100, resume_from_checkpoint="auto")
        assert code == 3 and "every checkpoint is damaged" in result["error"]["message"]

    def test_a_live_run(self, finetune: Command, base: Path, rows: Path, tmp_path: Path) -> None:
        process = _start(words(base, rows, tmp_path / "out", max_steps=100_000, save_steps=100_000), tmp_path)
        _wait_for_step(process, tmp_path / "out", 1)
        code, result, _ = finetune(tmp_path / "out")
        process.kill()
        process.wait()
        assert code == 2 and f"pid {process.pid}" in result["error"]["message"]

    def test_a_tracker_that_is_not_installed(self, finetune: Command, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        code, result, _ = finetune(tmp_path / "out", report_to="wandb")
        assert code == 4 and "alpaca-lora[wandb]" in result["error"]["message"]


def test_a_checkpoint_in_another_folder_can_be_resumed(finetune: Command, tmp_path: Path) -> None:
    assert finetune(tmp_path / "one")[0] == 0
    code, result, _ = finetune(tmp_path / "two", resume_from_checkpoint=tmp_path / "one" / "checkpoint-4")
    assert code == 0 and result["steps"] == 6
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert verify(tmp_path / "two" / "checkpoint-6").step == 6


def _start(arguments: list[str], tmp_path: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own; what it prints goes to ``printed``."""
    with open(tmp_path / "printed", "wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", "alpaca_lora", *arguments], stdout=printed, stderr=printed,
            cwd=Path(__file__).parents[2], env={**os.environ, "ALPACA_LORA_HOME": str(tmp_path / "home")},
        )  # fmt: skip


def _wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    log = folder / "metrics.jsonl"
    for _ in range(6000):
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        if process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    pytest.fail(f"the run did not reach step {step}: {(folder.parent / 'printed').read_text()[-2000:]}")
