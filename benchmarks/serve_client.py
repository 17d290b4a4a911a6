"""A server as a process, and a client that reads its streams and notes when each piece came. Imports no torch.

Traffic goes to this machine only (127.0.0.1): the servers are children of the benchmark and end with it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS, STOP_SECONDS = 180.0, 60.0
HEALTH_SECONDS = 10.0  # a probe that takes longer has failed


class Server:
    """A child process that serves HTTP at ``url``; what it says goes to ``log``."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], url: str | None = None) -> None:
        """``url``: None where it says it itself, as ours does in "http://... serves ..."."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log)
        self._url = url

    @property
    def url(self) -> str:
        assert self._url is not None
        return self._url

    def wait(self, path: str) -> None:
        """Until a GET of ``path`` gives 200. RuntimeError, with the end of its log, when that never happens."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if self._url is None and (found := re.search(r"(http://\S+?)/? serves ", self.said())):
                self._url = found[1]
            if self._url is not None and _answers(self._url + path):
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start:\n{self.said()[-2000:]}")

    def said(self) -> str:
        self.log.flush()
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that does not help; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        self.log.close()
        return code


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def ours(base_model: str, *words: str, keys: str = "") -> Iterator[Server]:
    """`alpaca-lora serve` on a free port, ready to be asked."""
    command = [sys.executable, "-m", "alpaca_lora", "serve", "--base_model", base_model, "--device", "cpu"]
    command += ["--port", "0", "--served_model_name", "base", *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ALPACA_LORA_API_KEYS": keys}
    server = Server(command, environment)
    try:
        server.wait("/ready")
        yield server
    finally:
        server.stop()


@contextmanager
def llama(python: str, gguf: str, threads: int) -> Iterator[Server]:
    """llama-cpp-python's server; it answers one request after the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_ctx", "2048"]
    # otherwise a second stream ends the first one
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    server = Server(command, dict(os.environ), f"http://127.0.0.1:{port}")
    try:
        server.wait("/v1/models")
        yield server
    finally:
        server.stop()


@dataclass
class Told:
    """What came of one stream: the seconds at which each piece of text came, and the end."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None

    def take(self, event: dict[str, Any], seconds: float) -> None:
        self.error = event.get("error") or self.error
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if piece:
                self.text += piece
                self.times.append(seconds)


async def read_stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], start: float) -> Told:
    """One streamed answer, read to its end. RuntimeError for a status other than 200."""
    told = Told()
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                told.take(json.loads(line[6:]), time.perf_counter() - start)
    return told


async def read_streams(url: str, bodies: Sequence[dict[str, Any]]) -> list[Told]:
    """All at once, each over a connection of its own; seconds count from the moment all are sent."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        return list(await asyncio.gather(*(read_stream(client, "/v1/completions", body, start) for body in bodies)))


class Prober:
    """Asks for /health over and over, each time over a new connection as a prober does, from a process of its own that
    nothing else keeps busy. ``milliseconds``: of each; ``failures``: those without status 200. Both after the end.
    """

    def __init__(self, url: str, every: float) -> None:
        self.milliseconds: list[float] = []
        self.failures = 0
        self._command = [sys.executable, __file__, url.removeprefix("http://"), str(every)]

    def __enter__(self) -> Prober:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        return self

    def __exit__(self, *exc: object) -> None:
        said, _ = self._process.communicate()  # closes its standard input, which ends it
        found = json.loads(said)
        self.milliseconds, self.failures = found["milliseconds"], found["failures"]


def probe(address: str, every: float) -> None:
    """Until standard input ends; prints one line of JSON."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    milliseconds: list[float] = []
    failures = 0
    while not ended.wait(every):
        start = time.perf_counter()
        connection = http.client.HTTPConnection(address, timeout=HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            failures += connection.getresponse().status != 200
        except (OSError, http.client.HTTPException):
            failures += 1
        finally:
            connection.close()
        milliseconds.append(1000 * (time.perf_counter() - start))
    print(json.dumps({"milliseconds": milliseconds, "failures": failures}))


if __name__ == "__main__":
    probe(sys.argv[1], float(sys.argv[2]))
