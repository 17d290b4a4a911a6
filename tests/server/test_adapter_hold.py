"""An adapter that has left memory is read again beside the engine, and never by its thread (serving case 8)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import httpx
import pytest

from alpaca_lora.inference import checked_adapter
from alpaca_lora.inference.engine import Engine
from tests.inference.adapter_folders import LABELS, make_bank, make_folder
from tests.server.open_server import BASE, OpenServer, chat_body, open_server, until
from tests.tiny import CHATML, ByteTokenizer

TOKENIZER = ByteTokenizer(chat_template=CHATML)


@dataclass
class Disk:
    """Files of adapters are read while ``gate`` is set; ``readers``: the threads that read some."""

    gate: threading.Event = field(default_factory=threading.Event)
    reading: threading.Event = field(default_factory=threading.Event)
    readers: list[str] = field(default_factory=list)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, real = Disk(), checked_adapter.read_tensors
    disk.gate.set()

    def read(*args: Any) -> Any:
        disk.readers.append(threading.current_thread().name)
        disk.reading.set()
        assert disk.gate.wait(30)
        return real(*args)

    monkeypatch.setattr(checked_adapter, "read_tensors", read)
    return disk


@pytest.fixture
def server(tmp_path: Path, disk: Disk) -> Iterator[OpenServer]:
    """Room for two of three adapters: ``far`` has left for ``near`` and ``judge``."""
    model, bank = make_bank()
    size = bank.load("far", make_folder(tmp_path / "far", seed=1)).num_bytes
    bank.max_bytes = size // 2 + size + bank.load("judge", make_folder(tmp_path / "judge", labels=LABELS)).num_bytes
    bank.load("near", make_folder(tmp_path / "near", seed=3))
    assert [bank.get(name).is_resident for name in ("far", "judge", "near")] == [False, True, True]
    disk.readers.clear()
    disk.reading.clear()
    engine = Engine(model, TOKENIZER, bank=bank, max_running=8, step_tokens=64)
    with open_server(engine, bank=bank, tokenizer=TOKENIZER) as opened:
        yield opened
        disk.gate.set()
        until(lambda: opened.is_idle and not bank._users)


def test_others_are_answered_while_an_adapter_is_read(server: OpenServer, disk: Disk) -> None:
    disk.gate.clear()
    with ThreadPoolExecutor(12) as pool:
        far = [pool.submit(server.chat, model="far", temperature=0, max_tokens=8) for _ in range(12)]
        assert disk.reading.wait(10)
        for model in (BASE, "near", BASE):
            answer = server.chat(model=model, temperature=0, max_tokens=8, stream=True)
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text
        assert server.get("/v1/models").status_code == 200
        assert not any(one.done() for one in far)
        disk.gate.set()
        answers = [one.result(20) for one in far]
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert {answer.status_code for answer in answers} == {200} and len(texts) == 1
    assert len(disk.readers) == 1 and disk.readers != ["engine"]


def test_a_classifier_is_read_beside_the_engine_too(server: OpenServer, disk: Disk) -> None:
    assert server.chat(model="far", max_tokens=1).status_code == 200  # for which the classifier leaves
    assert not server.service.models.bank.get("judge").is_resident
    disk.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        judged = pool.submit(server.post, "/v1/classify", {"model": "judge", "input": "roses"})
        assert server.chat(model=BASE, max_tokens=8).status_code == 200 and not judged.done()
        disk.gate.set()
        assert set(judged.result(20).json()["data"][0]["probabilities"]) == set(LABELS)
    assert "engine" not in disk.readers


def test_who_leaves_while_it_is_read_holds_nothing(server: OpenServer, disk: Disk) -> None:
    disk.gate.clear()
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=chat_body(model="far"), timeout=1)
    assert disk.reading.wait(10)
    until(lambda: not server.service.lifecycle.num_active)
    disk.gate.set()
    until(lambda: server.service.models.bank.get("far").is_resident)
    until(lambda: not server.service.models.bank._users)  # pyright: ignore[reportAttributeAccessIssue]


def test_what_cannot_be_read_again_is_no_fault_of_who_asks(server: OpenServer, tmp_path: Path) -> None:
    rmtree(tmp_path / "far")
    answer = server.chat(model="far")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_unreadable")
    assert str(tmp_path) not in answer.text
    assert server.chat(model="near", max_tokens=2).status_code == 200
