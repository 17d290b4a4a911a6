"""A stranger's folder over HTTP (serving cases 1 to 4, 17): refused with a reason, and nobody else notices."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.inference.engine import Engine
from alpaca_lora.text.templates import load_template
from tests.inference.adapter_folders import edit, make_bank, make_folder, record
from tests.server.open_server import ADMIN_KEY, BASE, OpenServer, open_server, until
from tests.tiny import CHATML, ByteTokenizer

TOKENIZER = ByteTokenizer(chat_template=CHATML)
WEIGHTS = "adapter_model.safetensors"
FOR_EVER = "{% for i in range(10**9) %}x{% endfor %}"
LATE = f"{{% if messages[-1].content == 'boom' %}}{FOR_EVER}{{% endif %}}{CHATML}"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first tensor, and let the record not know of it."""
    tensors = load_file(folder / WEIGHTS)
    key = min(tensors)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    (folder / "alpaca_lora.json").unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def linked(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "elsewhere")


def with_template(folder: Path, text: str) -> None:
    shutil.rmtree(folder)
    template = {"kind": "chat", "name": "chat", "source": "f", "chat_template": text}
    made = record(template={**template, "sha256": hashlib.sha256(text.encode()).hexdigest()}, stop_ids=[257])
    make_folder(folder, note=made)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, "pickle"),
    "renamed pickle": (lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb())), "header|JSON"),
    "cut short": (lambda folder: os.truncate(folder / WEIGHTS, 100), "header|JSON|ends"),
    "link out of the folder": (linked, "a link to a file outside"),
    "not a number": (lambda folder: rewrite(folder, lambda t: t * float("nan")), "NaN or Inf"),
    "enormous": (lambda folder: rewrite(folder, lambda t: t * 1e30), "update of norm"),
    "no rows": (lambda folder: rewrite(folder, lambda t: t[:0]), "shape"),
    "another rank": (lambda folder: edit(folder, r=5), "shape"),
    "expression": (lambda folder: edit(folder, target_modules=r"(([a-z._0-9]*)*)*!"), "matches nothing"),
    "another base": (lambda folder: edit_record(folder, base_fingerprint="x" * 64), "another base"),
    "endless template": (lambda folder: with_template(folder, FOR_EVER), "cannot be used"),
    "template out of the sandbox": (
        lambda folder: with_template(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "cannot be used",
    ),
}  # fmt: skip


def edit_record(folder: Path, **changes: Any) -> None:
    shutil.rmtree(folder)
    make_folder(folder, note=record(**changes))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OpenServer]:
    root = tmp_path / "adapters"
    make_folder(root / "good", note=record(template=load_template("chat", TOKENIZER).to_record(), stop_ids=[257]))
    model, bank = make_bank()
    bank.load("good", root / "good")
    engine = Engine(model, TOKENIZER, bank=bank, max_running=8, step_tokens=64)
    with open_server(engine, bank=bank, tokenizer=TOKENIZER, adapter_dir=str(root)) as opened:
        yield opened
        until(lambda: opened.is_idle)


def say(server: OpenServer, model: str, text: str = "hi") -> Any:
    return server.chat(model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=8)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_and_nobody_notices(server: OpenServer, tmp_path: Path, kind: str) -> None:
    before = [say(server, model).json()["choices"][0]["message"] for model in (BASE, "good")]
    spoil, words = HOSTILE[kind]
    spoil(make_folder(tmp_path / "adapters/stranger", seed=1))
    started = time.monotonic()
    answer = server.post("/v1/adapters", {"name": "stranger"}, ADMIN_KEY)
    assert answer.status_code == 400 and time.monotonic() - started < 15
    error = answer.json()["error"]
    assert error["param"] == "path" and str(tmp_path) not in error["message"]
    assert any(word in error["message"] for word in words.split("|")), error
    assert server.service.models.names() == [BASE, "good"] and say(server, "stranger").status_code == 404
    assert [say(server, model).json()["choices"][0]["message"] for model in (BASE, "good")] == before


def test_a_template_that_loops_for_some_words_refuses_them(server: OpenServer, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "adapters/stranger", seed=1)
    with_template(folder, LATE)
    assert server.post("/v1/adapters", {"name": "stranger"}, ADMIN_KEY).status_code == 201
    started = time.monotonic()
    answer = say(server, "stranger", "boom")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert time.monotonic() - started < 15 and server.get("/health").status_code == 200
    assert say(server, "stranger").status_code == say(server, "good").status_code == 200
