"""Who comes in: a key on every path, admin's for adapters, nothing of it in the log; other sites' pages stay out."""

from __future__ import annotations

import hmac
import json
import logging

import httpx
import pytest
from starlette.routing import Route

from alpaca_lora.errors import ConfigError
from alpaca_lora.server.keys import ANONYMOUS, KeyRing
from alpaca_lora.server.metrics import MAX_MODELS, Metrics
from alpaca_lora.server.request_log import LOGGER
from tests.server.open_server import ADMIN_KEY, BASE, KEY, KEYS, OpenServer, chat_body, open_server

OPEN = {"/health", "/ready"}
UNKNOWN = (
    "/v1",
    "/v1/",
    "/docs",
    "/redoc",
    "/admin",
    "/v2/models",
    "/v1/embeddings",
    "/health/",
    "/Health",
)


def all_paths(server: OpenServer) -> list[tuple[str, str]]:
    app = server.listener.config.app
    routes = [route for route in app.routes if isinstance(route, Route)]  # type: ignore[union-attr]
    found = [(method, route.path) for route in routes for method in route.methods or ()]
    return [(method, path.replace("{name:path}", "x").replace("{name}", "x")) for method, path in found]


@pytest.mark.parametrize("headers", [
    {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": KEY},
    {"authorization": f"Basic {KEY}"}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": f"Bearer alice:{KEY}"}, {"authorization": f"Bearer {KEY.upper()}"}, {"x-api-key": KEY},
    {"authorization": "Bearer \xff\xfe"},
])  # fmt: skip
def test_every_path_but_health_wants_a_key(server: OpenServer, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with httpx.Client(base_url=server.url, headers=raw) as client:
        pages = set(server.service_pages)
        for method, path in [*all_paths(server), *(("GET", path) for path in UNKNOWN)]:
            if path in OPEN | pages:
                continue
            answer = client.request(method, path)
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert [client.get(path).status_code for path in sorted(OPEN)] == [200, 200]


def test_two_authorizations_are_none(server: OpenServer) -> None:
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("name", ["authorization", "Authorization", "AUTHORIZATION"])
def test_the_case_of_header_and_scheme_is_free(server: OpenServer, name: str) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert httpx.get(f"{server.url}/v1/models", headers={name: f"{scheme} {KEY}"}).status_code == 200


def test_a_key_in_the_address_is_none(server: OpenServer) -> None:
    assert httpx.get(f"{server.url}/v1/models?api_key={KEY}").status_code == 401


def test_unknown_paths_are_errors_in_the_same_shape(server: OpenServer) -> None:
    with server.http() as client:
        for path in UNKNOWN[:7]:
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.from_text(" ".join(f"k{i}:{'a' * 30}{i:04}" for i in range(50)), "keys")
    compared: list[tuple[int, int]] = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (f"{'a' * 30}0000", f"{'a' * 30}0049", "b" * 34, "", "a" * 10_000):
        compared.clear()
        ring.find(key)
        assert compared == [(32, 32)] * 50  # digests: a key's length is not told either


# ---- the ring


def test_entries_of_keys() -> None:
    ring = KeyRing.from_text(
        f"{KEY}, alice:{'a' * 16}\nadmin:{'b' * 16} admin-2:{'c' * 16} administrator:{'d' * 16}", "keys"
    )
    callers = [ring.find(key) for key in (KEY, "a" * 16, "b" * 16, "c" * 16, "d" * 16)]
    assert [caller is not None and caller.is_admin for caller in callers] == [False, False, True, True, False]
    assert callers[0] is not None and callers[0].name.startswith("key-") and KEY not in callers[0].name
    assert len({caller.tenant for caller in callers if caller}) == 5
    assert ring.find("") is None and not KeyRing.from_text(" \n", "keys")


@pytest.mark.parametrize("text", ["short", "a:b:" + "c" * 16, "näme:" + "c" * 16, ":" + "c" * 16, "c" * 300, "c" * 15])
def test_entries_that_are_no_keys(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.from_text(f"{KEY} {text}", "ALPACA_LORA_API_KEYS")
    assert "entry 2" in str(caught.value) and text not in str(caught.value) and KEY not in str(caught.value)


def test_keys_of_file_and_environment(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "keys"
    file.write_text(f"bob:{'b' * 16}\n")
    ring = KeyRing.read(str(file), {"ALPACA_LORA_API_KEYS": KEY})
    assert len(ring) == 2
    file.write_text("\n")
    for wrong in (file, tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError) as caught:
            KeyRing.read(str(wrong), {})
        assert caught.value.field == "api_keys_file"


# ---- without keys


def test_without_keys_only_this_machine_is_answered() -> None:
    with open_server(keys="") as server:
        port = server.url.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
            "[::1",
        ):
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 403, host
        # a page elsewhere can send this without asking; it is no JSON
        simple = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(chat_body()),
                            headers={"content-type": "text/plain"})  # fmt: skip
        assert simple.status_code == 415
        # loading reads folders: never without an admin key
        assert server.post("/v1/adapters", {"name": "x"}, key=None).status_code == 403
        assert not ANONYMOUS.is_admin


# ---- pages of other sites


def test_cors_is_closed(server: OpenServer) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    with server.http() as client:
        for answer in (client.options("/v1/models", headers=headers), client.get("/v1/models", headers=headers)):
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_opens_for_named_origins_only() -> None:
    with open_server(cors_origins=["https://good.example"]) as server:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        good = httpx.options(f"{server.url}/v1/models", headers={"origin": "https://good.example", **asked})
        assert good.status_code == 200  # a browser sends no key with the question
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in good.headers
        evil = httpx.options(f"{server.url}/v1/models", headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in evil.headers
        with server.http() as client:
            answer = client.get("/v1/models", headers={"origin": "https://good.example"})
            assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_security_headers_stand_on_every_answer(server: OpenServer) -> None:
    with server.http() as client:
        answers = [client.get("/health"), client.get("/nowhere"), client.get("/v1/models"), server.chat(stream=True),
                   server.chat(n=99), httpx.get(f"{server.url}/v1/models")]  # fmt: skip
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "'unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] in ("no-store", "no-cache") and "server" not in answer.headers


# ---- the log


def test_the_log_has_lines_of_json_without_content_or_keys(
    server: OpenServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    secret = "the-secret-of-a-prompt"
    server.chat(messages=[{"role": "user", "content": secret}], user="user\nname", stream=True)
    server.chat(model=f"no\nsuch\r\n{secret}")
    server.post(f"/v1/chat/completions?x={secret}", [secret])
    with server.http() as client:
        client.get("/a%0ab%0d%e2%80%a8c", headers={"x-request-id": "mine-1"})
        client.get("/v1/models", headers={"x-request-id": "not mine\tat all"})
        client.get("/health")
    with pytest.raises(httpx.HTTPStatusError):
        httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {KEY}{secret}"}).raise_for_status()
    said = [record.getMessage() for record in caplog.records]
    facts = [json.loads(line) for line in said]
    assert len(said) >= 6 and all(line.isprintable() and line.isascii() for line in said)
    everything = "\n".join(said)
    for hidden in (secret, KEY, ADMIN_KEY, "heard", "user\\nname"):
        assert hidden not in everything
    requests = [one for one in facts if one["event"] == "request"]
    assert requests[0]["key"] == "alice" and requests[0]["model"] == BASE and requests[0]["completion_tokens"] > 0
    assert requests[1]["model"] is None and requests[1]["status"] == 404
    assert [one["request_id"] for one in requests if one["path"].startswith("/a")] == ["mine-1"]
    assert not any(one["path"] == "/health" for one in requests)
    assert not any("at all" in one["request_id"] for one in requests)


def test_a_defect_is_logged_without_its_message(
    server: OpenServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise KeyError("words of a prompt")

    monkeypatch.setattr(server.service.models, "find", broken)
    answer = server.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    defect = next(json.loads(r.getMessage()) for r in caplog.records if "defect" in r.getMessage())
    assert defect["error"] == "KeyError" and defect["request_id"] == answer.headers["x-request-id"]
    assert "words" not in caplog.text and any("broken" in line for line in defect["traceback"])


# ---- metrics


def test_metrics_have_the_names_of_vllm() -> None:
    with open_server() as server:
        server.chat(model="shop")
        text = server.get("/metrics").text
    for line in (
        'vllm:num_requests_running{model_name="tiny-base"}',
        'vllm:num_requests_waiting{model_name="tiny-base"}',
        'vllm:kv_cache_usage_perc{model_name="tiny-base"}',
        'vllm:prefix_cache_queries_total{model_name="tiny-base"} 40.0',
        'vllm:prefix_cache_hits_total{model_name="tiny-base"} 8.0',
        'vllm:prompt_tokens_total{model_name="shop"}',
        'vllm:generation_tokens_total{model_name="shop"}',
        'vllm:request_success_total{finished_reason="stop",model_name="shop"}',
        'vllm:time_to_first_token_seconds_bucket{le="0.5",model_name="shop"}',
        'vllm:inter_token_latency_seconds_count{model_name="shop"}',
        'vllm:e2e_request_latency_seconds_sum{model_name="shop"}',
        'vllm:request_queue_time_seconds_sum{model_name="shop"} 0.25',
        'vllm:request_prefill_time_seconds_sum{model_name="shop"} 0.5',
        'vllm:request_prefill_time_seconds_bucket{le="0.5",model_name="shop"} 1.0',
        'vllm:request_decode_time_seconds_sum{model_name="shop"} 1.0',
        'vllm:request_inference_time_seconds_sum{model_name="shop"} 1.5',
        'vllm:request_prompt_tokens_count{model_name="shop"} 1.0',
        'vllm:request_generation_tokens_bucket{le="100.0",model_name="shop"} 1.0',
    ):
        assert f"\n{line}" in text, line


def test_names_in_labels_are_bounded(server: OpenServer) -> None:
    for number in range(50):
        server.chat(model=f"made-up-{number}")
    with server.http() as client:
        assert "made-up" not in client.get("/metrics").text
    metrics = Metrics("base", lambda: server.engine.stats())
    for number in range(10_000):
        metrics.finished(f"adapter-{number}", "stop", 1.0)
    lines = [line for line in metrics.expose().decode().splitlines() if line.startswith("vllm:request_success_total")]
    assert len(lines) == MAX_MODELS and any('"other"} 9901.0' in line for line in lines)


def test_keys_of_the_tests_are_three() -> None:
    assert len(KeyRing.from_text(KEYS, "keys")) == 3
