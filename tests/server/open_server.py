"""A server on a free port, in a thread: what the clients of the tests talk to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.server.app import create_app
from alpaca_lora.server.keys import KeyRing
from alpaca_lora.server.listener import Listener, bind
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.server.service import Service
from alpaca_lora.server.static_files import StaticFiles
from alpaca_lora.text.templates import load_template
from tests.server.fake_engine import FakeAdapter, FakeBank, FakeEngine
from tests.tiny import CHATML, ByteTokenizer

KEY, ADMIN_KEY = "test-key-of-16-chars", "admin-key-of-16-chars"
KEYS = f"alice:{KEY} admin:{ADMIN_KEY} bob:bobs-key-of-16-chars"
BASE = "tiny-base"


@dataclass
class OpenServer:
    """``url`` without a path; ``service``: what the routes share."""

    url: str
    service: Service
    engine: Any
    listener: Listener
    clients: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def openai(self, key: str = KEY) -> openai.OpenAI:
        """Closed with the server."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)
        return self.clients.enter_context(client)

    def async_openai(self, key: str = KEY) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def http(self, key: str | None = KEY) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)

    def get(self, path: str, key: str | None = KEY) -> httpx.Response:
        with self.http(key) as client:
            return client.get(path)

    def post(self, path: str, body: Any, key: str | None = KEY) -> httpx.Response:
        with self.http(key) as client:
            return client.post(path, json=body)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(**fields))

    @property
    def service_pages(self) -> list[str]:
        """Paths of the page, which ask for no key."""
        return StaticFiles().paths

    @property
    def is_idle(self) -> bool:
        """Nothing is held: no answer in the engine, no request, no ticket, no slot of a key."""
        bridge = self.service.bridge
        return not (
            self.engine.has_work or bridge.num_open or bridge._tickets or self.service.lifecycle.num_active
            or any(usage.running for usage in self.service.limits._usage.values())
        )  # fmt: skip


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "hi"}], **fields}


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what another thread does; fails where it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class NoGrammars:
    """In place of llguidance: any schema is a grammar that allows everything."""

    def json_object(self) -> Any:
        return "object"

    def json_schema(self, schema: object) -> Any:
        return schema


def adapters(tokenizer: ByteTokenizer) -> FakeBank:
    """shop answers behind alpaca's template, chatty behind the chat template, sentiment classifies."""
    alpaca = load_template("alpaca_short", tokenizer).to_record()
    chat = load_template("chat", tokenizer).to_record()
    shop = AdapterRecord(
        BASE, "f" * 64, alpaca, system_prompt="Be short.", stop_ids=[257], add_bos=True, metrics={"val_loss": 1.5}
    )
    chatty = AdapterRecord(BASE, "f" * 64, chat, stop_ids=[257, 260])
    sentiment = AdapterRecord(BASE, "f" * 64, labels=["bad", "good"], config={"cutoff_len": 32})
    return FakeBank(
        FakeAdapter("shop", Path("shop"), shop), FakeAdapter("chatty", Path("chatty"), chatty, digest="c" * 64),
        FakeAdapter("sentiment", Path("sentiment"), sentiment, labels=("bad", "good")),
    )  # fmt: skip


@contextlib.contextmanager
def open_server(
    engine: Any = None, *, bank: Any = None, keys: str = KEYS, tokenizer: ByteTokenizer | None = None,
    app_options: dict[str, Any] | None = None, **options: Any,
) -> Iterator[OpenServer]:  # fmt: skip
    """``options`` are those of `serve`; without an engine a `FakeEngine`."""
    tokenizer = tokenizer or ByteTokenizer(chat_template=CHATML)
    engine = engine or FakeEngine(tokenizer)
    bank = bank if bank is not None else adapters(tokenizer)
    prompts = PromptFormat.of(load_template(None, tokenizer), tokenizer)
    chosen = ServeOptions(**options)
    app = create_app(
        engine, bank, prompts, chosen, base_name=BASE, fingerprint="f" * 64,
        keys=KeyRing.from_text(keys, "keys"), **{"grammars": NoGrammars(), **(app_options or {})},
    )  # fmt: skip
    socket = bind("127.0.0.1", 0)
    listener = Listener(app, chosen)
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        until(lambda: listener.started)
        opened = OpenServer(f"http://127.0.0.1:{socket.getsockname()[1]}", app.state.service, engine, listener)
        with opened.clients:
            yield opened
    finally:
        if isinstance(engine, FakeEngine):
            engine.gate.set()
        listener.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
