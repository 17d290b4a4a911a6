"""`alpaca-lora serve` as a process: started, asked, ended; and the options that it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.device import pick_compute
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.models.load import load_base
from alpaca_lora.text.templates import load_template
from tests.commands.conftest import Program, snapshot
from tests.package_files import CHECKOUT

KEY = "serve-key-of-16-chars"


class Served:
    """A running server; ``lines``: what it has said on standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._has_address = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if re.search(r"http://\S+ serves ", line):
                self._has_address.set()
        self._has_address.set()

    @property
    def url(self) -> str:
        assert self._has_address.wait(120)
        found = re.search(r"(http://\S+)/ serves ", "".join(self.lines))
        assert found, "".join(self.lines)
        return found[1]

    def close(self) -> None:
        """After the process has ended."""
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(10)
        return code, "".join(self.lines)


@contextmanager
def serving(base: Path, *words: str, keys: str = f"admin:{KEY}", port: int = 0) -> Iterator[Served]:
    command = [sys.executable, "-m", "alpaca_lora", "serve", "--base_model", str(base), "--device", "cpu"]
    command += ["--dtype", "float32", "--num_threads", "1", "--port", str(port), "--served_model_name", "tiny", *words]
    environment = {**os.environ, "ALPACA_LORA_API_KEYS": keys, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )  # fmt: skip
    served = Served(process)
    try:
        yield served
    finally:
        process.kill()
        process.wait()
        served.close()


@pytest.mark.slow
def test_a_trained_adapter_is_served(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    words = ("--lora", f"mine={trained}", "--adapter_dir", str(trained.parent), "--safety_policy", "bundled")
    with serving(tiny_base, *words, "mine=none", "--audit_log", str(audit)) as served:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
            assert client.get("/ready").status_code == 200
            models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
            assert list(models) == ["tiny", "mine"]
            assert models["mine"]["template"] == "chat" and models["mine"]["rank"] == 4
            for model in models:
                body = {"model": model, "messages": [{"role": "user", "content": "Say 3"}], "max_tokens": 5}
                assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] >= 1
            report = client.get("/v1/adapters/mine/report").json()
            assert [row["step"] for row in report["metrics"] if "train_loss" in row] == [1, 2]
            again = client.post("/v1/adapters", json={"name": "again", "path": trained.name})
            assert again.status_code == 201
            refused = {"model": "tiny", "messages": [{"role": "user", "content": "my card is 4111 1111 1111 1111"}]}
            client.post("/v1/chat/completions", json={**refused, "max_tokens": 2})
            assert client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
        code, err = served.end()
    assert code == 143 and "stopped by SIGTERM" in err and KEY not in err and "4111" not in err
    found = [json.loads(line) for line in audit.read_text().splitlines()]
    assert found and found[0]["side"] == "input" and "4111" not in audit.read_text()


@pytest.mark.slow
def test_a_killed_server_comes_back_as_it_was(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    """Case 23: SIGKILL in the middle of an answer; started again on its port it says the same, from the same files."""
    audit, files = tmp_path / "audit.jsonl", snapshot(trained)
    words = ["--lora", f"mine={trained}", "--safety_policy", "bundled", "--audit_log", str(audit)]
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": "mine", "messages": [{"role": "user", "content": "Say 3. My card: 4111 1111 1111 1111"}]}
    answers, port = [], 0
    for number in range(2):
        with serving(tiny_base, *words, port=port) as served, httpx.Client(
            base_url=served.url, headers=headers, timeout=60
        ) as client:  # fmt: skip
            port = int(served.url.rpartition(":")[2])
            answer = client.post("/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": 8})
            answers.append(answer.json()["choices"][0]["message"]["content"])
            with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
                next(stream.iter_lines())
                served.process.kill()
                assert served.process.wait(30) == -signal.SIGKILL
        notes = [json.loads(line) for line in audit.read_text().splitlines()]
        assert len(notes) > number and all(note["side"] for note in notes)
        assert snapshot(trained) == files
    assert answers[0] == answers[1] and [path.name for path in tmp_path.iterdir()] == ["audit.jsonl"]


QUESTIONS = ("When do you open?", "Name three colours.", "What is a lantern?")
ANSWER = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def two_adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the real model, with two templates, saved as training saves them: random, and far from zero."""
    root, compute = tmp_path_factory.mktemp("adapters"), pick_compute("cpu", "float32", 1)
    folders: dict[str, Path] = {}
    for seed, (name, template) in enumerate({"shop": "alpaca_short", "poet": "chat"}.items()):
        base = load_base(str(smollm2), compute)
        chosen = {"lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]}
        adapter = Lora.attach(base.model, AdapterOptions(**chosen), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in adapter.trained_parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        used = load_template(template, base.tokenizer)
        prompts = PromptFormat.of(used, base.tokenizer, system_prompt="Be brief.")
        note = AdapterRecord(
            base.name, base.fingerprint, used.to_record(), "Be brief.", list(prompts.stop_ids), add_bos=prompts.add_bos,
            tokenizer_fingerprint=base.tokenizer.fingerprint,
        )  # fmt: skip
        save_adapter(root / name, adapter, note)
        folders[name] = root / name
    return folders


@pytest.mark.slow
def test_the_real_model_says_over_http_what_generate_says(
    program: Program, smollm2: Path, two_adapters: dict[str, Path]
) -> None:
    """Each adapter alone, both at once, and the command: one answer."""
    words = ("--lora", *(f"{name}={folder}" for name, folder in two_adapters.items()))
    asked = [(model, question) for question in QUESTIONS for model in (*two_adapters, "tiny")]
    with serving(smollm2, *words) as served, httpx.Client(
        base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120
    ) as client, ThreadPoolExecutor(len(asked)) as pool:  # fmt: skip

        def ask(model: str, question: str) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": question}], **ANSWER}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        alone = [ask(*one) for one in asked]
        assert list(pool.map(lambda one: ask(*one), asked)) == alone
        steps = client.get("/metrics").text
    assert len(set(alone)) > len(asked) // 2 and 'vllm:generation_tokens_total{model_name="poet"}' in steps
    for name, folder in two_adapters.items():
        said = program(
            "generate", base_model=smollm2, lora_weights=folder, prompt=QUESTIONS[0], max_new_tokens=24, temperature=0
        )
        assert said.code == 0 and said.result["text"] == alone[asked.index((name, QUESTIONS[0]))], name
    for place, question in enumerate(QUESTIONS):
        shop, poet, base = alone[3 * place : 3 * place + 3]
        assert len({shop, poet, base}) == 3, question  # they do act


def test_options_that_do_not_fit_are_told_at_once(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ALPACA_LORA_API_KEYS", raising=False)
    base = {"base_model": program.base, "port": 0}
    program.refuses("serve", 2, "host", "no API keys", **base, host="0.0.0.0")
    program.refuses("serve", 2, "lora", "NAME=DIR", **base, lora="runs/shop")
    program.refuses("serve", 2, "given twice", **base, words=("--lora", "a=x", "a=y"))
    program.refuses("serve", 2, "api_keys_file", **base, api_keys_file=str(tmp_path / "none"))
    program.refuses("serve", 2, "--api_keys", **base, api_keys=KEY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        program.refuses("serve", 4, "cannot listen", base_model=program.base, port=taken.getsockname()[1])
    monkeypatch.setenv("ALPACA_LORA_API_KEYS", "short")
    done = program.refuses("serve", 2, "ALPACA_LORA_API_KEYS", "entry 1", **base)
    assert "short" not in done.err.replace("shorten", "")


def test_models_that_do_not_fit_are_refused(program: Program, trained: Path, tmp_path: Path) -> None:
    base = {"base_model": program.base, "port": 0, "device": "cpu", "num_threads": 1, "dtype": "float32"}
    program.refuses("serve", 2, "name of the base", **base, lora=f"tiny={trained}", served_model_name="tiny")
    program.refuses("serve", 2, "../x", **base, lora=f"../x={trained}")
    program.refuses("serve", 2, "safety_policy", "nobody", **base, safety_policy="nobody=bundled")
    program.refuses("serve", 2, "step_tokens", **base, step_tokens=4, max_running=8)


def test_a_missing_extra_is_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_lora.commands.serve.EXTRA", ("a_package_that_is_not_there",))
    program.refuses("serve", 4, "a_package_that_is_not_there", "alpaca-lora[serve]", base_model=program.base)
