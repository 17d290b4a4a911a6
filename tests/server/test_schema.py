"""Requests drawn from the description of the API, and requests that break it: never a 5xx, always the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.open_server import ADMIN_KEY, OpenServer, open_server

OPERATIONS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/classify", "POST /v1/moderations",
    "POST /v1/adapters", "DELETE /v1/adapters/{name}", "GET /v1/adapters", "GET /v1/adapters/{name}/report",
    "GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /ready", "GET /metrics",
)  # fmt: skip


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenServer, dict[str, Any]]]:
    with open_server(adapter_dir=str(tmp_path_factory.mktemp("adapters"))) as server:
        schema: Any = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
        operations = [found.ok() for found in schema.get_all_operations()]
        yield server, {f"{one.method.upper()} {one.path}": one for one in operations}


def test_every_operation_is_tried(described: tuple[OpenServer, dict[str, Any]]) -> None:
    assert set(described[1]) == set(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_is_a_server_error(described: tuple[OpenServer, dict[str, Any]], name: str) -> None:
    server, operations = described
    modes = schemathesis.GenerationMode
    drawn = st.one_of(*(operations[name].as_strategy(mode) for mode in (modes.POSITIVE, modes.NEGATIVE)))
    seen: set[int] = set()

    @settings(
        max_examples=80, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn)
    def ask(case: Any) -> None:
        answer = case.call(base_url=server.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=30)
        seen.add(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400 and case.method.upper() != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert seen
