"""A long mixed load against our server as users start it: does memory stay flat, is everything given back in the end?

    python benchmarks/soak_serve.py [--minutes 10] [--base_model smollm2-135m]

Clients with two keys stream chats of the base and of adapters, ask for JSON, go away before and in the middle of an
answer, and send what has to be refused; the administrator loads and unloads adapters, also such as are in use. More
is asked for than the queue takes, and the cache is so small that answers give up their room. /health is probed all the
while. Every 30 seconds a row: resident memory, threads, open files, what the engine holds. In the end the load stops
and the server has to hold nothing. The last line is JSON and is kept in benchmarks/results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import serve_client  # noqa: E402
from benchmarks import serve_figures as figures  # noqa: E402
from benchmarks.machine_card import keep  # noqa: E402
from benchmarks.random_adapters import make_adapters  # noqa: E402
from benchmarks.serve_client import Server  # noqa: E402

KEYS = {"alice": "key-of-alice-0001", "bob": "key-of-bob-000002", "admin": "key-of-admin-0003"}
ADAPTERS = 4
WORDS = ["--max_running", "8", "--max_queue", "6", "--max_answer_tokens", "256", "--log_level", "warning"]
CACHE_GB = 0.03  # about 1,300 tokens of smollm2-135m
PROBE_SECONDS, ROW_SECONDS, SETTLE_SECONDS = 0.1, 30.0, 60.0
MAX_HEALTH_MS = 100.0
# of resident memory, from the second quarter to the last: pages, compiled kernels of shapes that come late
MAX_GROWTH = 1.05
SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
TOPICS = ("the sea", "a clock", "bread", "winter", "two friends", "a long train", "numbers", "a small shop", "rain")
BAD: tuple[tuple[str, dict[str, Any] | str, int], ...] = (
    ("/v1/chat/completions", {"model": "base", "messages": []}, 400),
    ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404),
    (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "x"}], "tool_choice": "auto"},
        400,
    ),
    ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": -1}, 400),
    ("/v1/completions", {"model": "base", "prompt": [1, 10**8]}, 400),
    ("/v1/completions", {"model": "base", "prompt": "word " * 20_000}, 400),
    ("/v1/completions", "{not json", 400),
    ("/v1/completions", "[" * 5_000, 400),
    ("/v1/adapters", {"name": "../x", "path": "../x"}, 403),
    ("/v1/nothing", {}, 404),
)


@dataclass
class Soak:
    """One run: where, until when, what happened. ``outcomes``: by kind and what came of it; ``defects``: in words."""

    url: str
    end: float
    random: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {KEYS[key]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120)

    def count(self, kind: str, outcome: object) -> None:
        self.outcomes[f"{kind}: {outcome}"] += 1

    def defect(self, kind: str, what: str) -> None:
        self.count(kind, "DEFECT")
        if len(self.defects) < 20:
            self.defects.append(f"{kind}: {what[:300]}")

    def chat(self, **more: Any) -> dict[str, Any]:
        """A chat that no other has asked, so that the prefix cache cannot answer all of them."""
        chance = self.random
        turns = [f"Tell me about {chance.choice(TOPICS)}, {chance.randrange(10**6)}. "] * chance.randint(1, 12)
        return {
            "model": chance.choice(["base", *(f"a{number}" for number in range(ADAPTERS))]),
            "messages": [{"role": "user", "content": "".join(turns)}], "max_tokens": chance.randint(4, 96),
            "temperature": chance.choice([0, 0.7, 1.2]), "seed": chance.randrange(100), **more,
        }  # fmt: skip

    async def stream(self, client: httpx.AsyncClient) -> None:
        """A chat read to its end."""
        await self._read("stream", client, self.chat(stream=True, stream_options={"include_usage": True}), None)

    async def leave(self, client: httpx.AsyncClient) -> None:
        """A client that goes away: at once, or after some pieces."""
        pieces = self.random.choice([0, 1, 3, 10])
        await self._read("leave", client, self.chat(stream=True, max_tokens=200), pieces)

    async def hurry(self, client: httpx.AsyncClient) -> None:
        """One that does not even wait for the first byte, in the queue or behind a long prompt."""
        try:
            seconds = self.random.uniform(0.01, 0.3)
            response = await client.post("/v1/chat/completions", json=self.chat(max_tokens=200), timeout=seconds)
            await self._refused("hurry", response.status_code, response.text)
        except httpx.TimeoutException:
            self.count("hurry", "gone")

    async def json_mode(self, client: httpx.AsyncClient) -> None:
        """JSON by a schema, or any: what was finished has to be JSON."""
        form: dict[str, Any] = {"type": "json_object"}
        if self.random.random() < 0.5:
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        response = await client.post("/v1/chat/completions", json=self.chat(response_format=form, max_tokens=64))
        if response.status_code != 200:
            await self._refused("json", response.status_code, response.text)
            return
        choice = response.json()["choices"][0]
        self.count("json", choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            try:
                json.loads(choice["message"]["content"])
            except ValueError:
                self.defect("json", f"is none: {choice['message']['content']}")

    async def bad(self, client: httpx.AsyncClient) -> None:
        """What has to be refused, with exactly this status."""
        path, body, status = self.random.choice(BAD)
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"content-type": "application/json"}
        if self.random.random() < 0.1:
            headers["authorization"], status = "Bearer wrong-key-0123456", 401
        response = await client.post(path, content=content, headers=headers)
        self.count("bad", response.status_code)
        if response.status_code != status or "message" not in response.json()["error"]:
            self.defect("bad", f"{path}: {response.status_code}, not {status}: {response.text}")

    async def adapters(self, client: httpx.AsyncClient) -> None:
        """The administrator: load under a name, use it, unload it, sometimes while it is used."""
        name, path = f"live-{self.random.randrange(2)}", f"a{self.random.randrange(ADAPTERS)}"
        loaded = await client.post("/v1/adapters", json={"name": name, "path": path})
        self.count("load", loaded.status_code)
        if loaded.status_code != 201:
            self.defect("load", loaded.text)
            return
        use = self._read("use", client, self.chat(model=name, stream=True, max_tokens=24), None)
        if self.random.random() < 0.5:
            using = asyncio.create_task(use)
            await asyncio.sleep(self.random.uniform(0, 1))
            gone = await client.delete(f"/v1/adapters/{name}")
            await using
        else:
            await use
            gone = await client.delete(f"/v1/adapters/{name}")
        self.count("unload", gone.status_code)
        if gone.status_code != 200:
            self.defect("unload", gone.text)

    async def _read(self, kind: str, client: httpx.AsyncClient, body: dict[str, Any], pieces: int | None) -> None:
        """Read a stream, or only so many pieces of it."""
        told, seen = serve_client.Told(), 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await self._refused(kind, response.status_code, (await response.aread()).decode())
                return
            async for line in response.aiter_lines():
                if pieces is not None and seen >= pieces:
                    self.count(kind, "gone")
                    return
                if line.startswith("data: ") and line != "data: [DONE]":
                    told.take(json.loads(line[6:]), time.monotonic())
                    seen += 1
        self.tokens += (told.usage or {}).get("completion_tokens", 0)
        self.count(kind, told.finish_reason)
        if told.error is not None or told.finish_reason not in ("stop", "length"):
            self.defect(kind, f"ended as {told.finish_reason}: {told.error}")

    async def _refused(self, kind: str, status: int, text: str) -> None:
        """A full queue may refuse anything; an adapter that was unloaded meanwhile is not found."""
        self.count(kind, status)
        if status == 429:
            await asyncio.sleep(self.random.uniform(0.2, 1))
        if status != 200 and status != 429 and not (status == 404 and kind == "use"):
            self.defect(kind, f"{status}: {text}")

    async def repeat(self, name: str, key: str, seconds: float) -> None:
        """One client: the same over and over, with pauses of up to ``seconds``."""
        act: Callable[[httpx.AsyncClient], Awaitable[None]] = getattr(self, name)
        async with self.client(key) as client:
            while self.goes_on:
                try:
                    await act(client)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.defect(name, f"{type(error).__name__}: {error}")
                await asyncio.sleep(self.random.uniform(0, seconds))


def held(server: Server) -> dict[str, Any]:
    """What the process and its engine hold now."""
    folder = Path("/proc") / str(server.process.pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    headers = {"authorization": f"Bearer {KEYS['alice']}"}
    metrics = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text

    def metric(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:_total)?{{[^}}]*}} (\S+)$", metrics, re.M))

    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024, "threads": int(status["Threads"]),
        "files": len(os.listdir(folder / "fd")), "running": metric("num_requests_running"),
        "waiting": metric("num_requests_waiting"), "kv_usage": metric("kv_cache_usage_perc"),
        "preemptions": metric("num_preemptions"), "tokens": metric("generation_tokens"),
    }  # fmt: skip


async def load(soak: Soak, server: Server, rows: list[dict[str, Any]], console: Console) -> None:
    """All clients until the end, and a row of the table every half minute."""
    started = time.monotonic()
    clients = [("stream", key, 0.2) for key in ("alice", "bob") for _ in range(6)]
    clients += [("leave", "alice", 0.5), ("leave", "bob", 0.5), ("hurry", "bob", 1), ("json_mode", "alice", 0.5)]
    clients += [("json_mode", "bob", 0.5), ("bad", "bob", 0.3), ("adapters", "admin", 2)]
    tasks = [asyncio.create_task(soak.repeat(*client)) for client in clients]
    every = min(ROW_SECONDS, max(1.0, (soak.end - started) / 8))
    while soak.goes_on and server.process.poll() is None:
        await asyncio.sleep(min(every, max(0.0, soak.end - time.monotonic())))
        row = {"seconds": round(time.monotonic() - started), **await asyncio.to_thread(held, server)}
        rows.append(row)
        console.print(f"{row['seconds']} s: {row['rss_mb']:.0f} MB, {row['running']:.0f} run", highlight=False)
    await asyncio.gather(*tasks)


def settle(server: Server) -> dict[str, Any]:
    """What is held once nobody asks any more; connections that are kept alive are closed by then."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        now = held(server)
        if not (now["running"] or now["waiting"] or now["kv_usage"]) or time.monotonic() > end:
            return now
        time.sleep(0.5)


def verdicts(soak: Soak, rows: list[dict[str, Any]], idle: tuple[dict[str, Any], dict[str, Any]], health: Any,
             code: int) -> dict[str, bool]:  # fmt: skip
    before, after = idle
    quarter = max(1, len(rows) // 4)
    # medians: a single row shows what is computed in this moment, 30 MB more or less
    early, late = (statistics.median(row["rss_mb"] for row in some)
                   for some in (rows[quarter : 2 * quarter] or rows, rows[-quarter:]))  # fmt: skip
    return {
        "memory is flat": late <= MAX_GROWTH * early,
        "nothing is held in the end": not (after["running"] or after["waiting"] or after["kv_usage"]),
        # a connection of the last probe may still be closing
        "no file is left open": after["files"] <= before["files"] + 3,
        "no thread is left": after["threads"] <= max(row["threads"] for row in rows[: len(rows) // 2 + 1]),
        f"/health within {MAX_HEALTH_MS:g} ms": health["max"] <= MAX_HEALTH_MS and not health["failures"],
        "no answer was wrong": not soak.defects, "SIGTERM ends it orderly": code == 143,
    }  # fmt: skip


def report(console: Console, soak: Soak, rows: list[dict[str, Any]], after: dict[str, Any], judged: Any) -> None:
    heads = ("seconds", "rss_mb", "threads", "files", "running", "waiting", "kv_usage", "preemptions", "tokens")
    table = Table(title="held by the server")
    for head in heads:
        table.add_column(head, justify="right")
    for row in [*rows, {"seconds": "idle", **after}]:
        shown = {**row, "kv_usage": f"{row['kv_usage']:.2f}"}
        table.add_row(*(v if isinstance(v := shown[head], str) else f"{v:.0f}" for head in heads))
    console.print(table)
    console.print(dict(sorted(soak.outcomes.items())), soak.defects)
    for name, holds in judged.items():
        console.print(f"{'yes' if holds else 'NO ':3} {name}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kv_cache_gb", type=float, default=CACHE_GB)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="keep no result")
    asked = parser.parse_args()
    # a table that is written to a file is as wide as it needs
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 130)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="soak-serve-") as name:
        folders = make_adapters(asked.base_model, Path(name), ADAPTERS)
        words = [*WORDS, "--kv_cache_gb", str(asked.kv_cache_gb), "--adapter_dir", name, "--dtype", asked.dtype]
        words += ["--lora", *(f"{folder.name}={folder}" for folder in folders)]
        keys = " ".join(f"{who}:{key}" for who, key in KEYS.items())
        with serve_client.ours(asked.base_model, *words, keys=keys) as server:
            before = held(server)
            end = time.monotonic() + 60 * asked.minutes
            soak = Soak(server.url, end, random.Random(asked.seed))
            with serve_client.Prober(server.url, PROBE_SECONDS) as prober:
                asyncio.run(load(soak, server, rows, console))
            health = {**figures.health(prober.milliseconds), "failures": prober.failures}
            after, said = settle(server), server.said()
            code = server.stop()
    judged = verdicts(soak, rows, (before, after), health, code)
    report(console, soak, rows, after, judged)
    if soak.defects:
        console.print(said[-3000:], markup=False, highlight=False)
    card = {"model": asked.base_model, "minutes": asked.minutes, "kv_cache_gb": asked.kv_cache_gb}
    line = figures.rounded({
        **card, "verdicts": judged, "health_ms": health, "outcomes": dict(sorted(soak.outcomes.items())),
        "defects": soak.defects, "before": before, "after": after,
    })  # fmt: skip
    line["rows"] = list(map(figures.rounded, rows))
    print(json.dumps(line) if asked.dry else keep("soak", line))


if __name__ == "__main__":
    main()
