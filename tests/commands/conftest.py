"""A tiny model, its rows and one trained run, and the program as the shell runs it: for the tests of bad input."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alpaca_lora.cli import main
from alpaca_lora.device import current_memory_bytes, peak_memory_bytes, reset_peak_memory
from alpaca_lora.weights.huggingface import write_folder
from tests.tiny import CHATML, ByteTokenizer, tiny_model

MAX_MESSAGE = 2000  # characters; an error is read by a person
Write = Callable[..., Path]


@dataclass(frozen=True)
class Outcome:
    """What a command left on its way out: exit code, the last line's JSON, both streams."""

    code: int
    result: dict[str, Any]
    out: str
    err: str


@dataclass(frozen=True)
class Program:
    """Runs commands in this process. Options of the command under test win over those that make it run at all."""

    base: Path
    rows: Path
    folder: Path  # of this test

    def __call__(self, command: str, *words: str, **options: Any) -> Outcome:
        """An option None is left out."""
        settings = {**self._defaults(command), **options}
        flags = [f"--{key}={value}" for key, value in settings.items() if value is not None]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([command, *words, *flags, "--json"])
        return Outcome(code, json.loads(out.getvalue().splitlines()[-1]), out.getvalue(), err.getvalue())

    def refuses(self, command: str, code: int, *says: str, words: tuple[str, ...] = (), **options: Any) -> Outcome:
        """Runs it and holds what every refusal keeps: one message with all of ``says``, no traceback, nothing lost."""
        output = Path(str({**self._defaults(command), **options}.get("output_dir") or "none"))
        before = snapshot(output)
        done = self(command, *words, **options)
        message = done.result.get("error", {}).get("message", "")
        assert (done.code, done.result.get("exit_code")) == (code, code), done.result
        assert [part for part in says if part not in message] == [], message
        assert "Traceback" not in done.err
        assert done.err.count("error: ") == 1 and done.err.endswith(f"error: {message}\n")
        assert len(message) < MAX_MESSAGE
        assert snapshot(output) == before
        return done

    def _defaults(self, command: str) -> dict[str, Any]:
        model: dict[str, Any] = {"base_model": self.base, "device": "cpu", "num_threads": 1}
        if command in ("finetune", "check"):
            return {
                **model, "data_path": self.rows, "output_dir": self.folder / "out", "dtype": "float32", "max_steps": 2,
                "batch_size": 4, "micro_batch_size": 1, "cutoff_len": 256, "val_set_size": 0, "lora_r": 4,
                "learning_rate": 0.01, "save_steps": 1, "num_sample_answers": 0,
            }  # fmt: skip
        if command == "generate":
            return {**model, "dtype": "float32", "prompt": "Hi", "max_new_tokens": 2}
        if command in ("merge", "quantize"):
            return {**model, "output_dir": self.folder / ("merged" if command == "merge" else "quantized")}
        return {}


def snapshot(path: Path) -> dict[str, str] | str | None:
    """Name -> sha256 of every file of a folder; of a file itself; None where nothing is."""
    if not os.path.exists(path):
        return None
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


@contextlib.contextmanager
def small_and_quick(seconds: float = 1.0, megabytes: int = 100) -> Iterator[None]:
    """What runs inside takes less time of the processor and less additional memory than that."""
    can_measure = reset_peak_memory()
    before, start = current_memory_bytes(), time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert not can_measure or peak_memory_bytes() - before < megabytes * 1e6


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers as a Hugging Face folder, with a byte tokenizer and a chat template."""
    return write_base(tmp_path_factory.mktemp("models") / "tiny")


def write_base(path: Path, tokenizer: ByteTokenizer | None = None, **options: Any) -> Path:
    """A model folder; ``options`` as `write_folder` (max_shard_bytes) and `tiny_config` take them."""
    shards = {key: options.pop(key) for key in ("max_shard_bytes",) if key in options}
    model = tiny_model(max_position_embeddings=1024, **options)
    saver = (tokenizer or ByteTokenizer(chat_template=CHATML)).save
    return write_folder(path, model.state_dict().items(), model.config.to_hf(), tokenizer_saver=saver, **shards)


def alpaca_lines(count: int = 12) -> str:
    rows = [
        {"instruction": f"Say the number {i}", "input": "", "output": f"It is {i * i} or so."} for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: an adapter, and checkpoint-1 and checkpoint-2. Read only; `copied` gives one to break."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_text(alpaca_lines())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPACA_LORA_HOME", str(folder / "home"))
        done = Program(tiny_base, folder / "rows.jsonl", folder)("finetune")
    assert done.code == 0, done.err
    return folder / "out"


@pytest.fixture
def program(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("ALPACA_LORA_HOME", str(tmp_path / "home"))
    (tmp_path / "rows.jsonl").write_text(alpaca_lines())
    return Program(tiny_base, tmp_path / "rows.jsonl", tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(content, name="c.yml") -> the path of a file of this test."""

    def _write(content: str | bytes, name: str = "c.yml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return _write


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """copied(folder) -> a copy of it that a test may break."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy" / folder.name))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value `...` removes its key."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), encoding="utf-8")


class Canary:
    """A pickle that leaves a file behind when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)
