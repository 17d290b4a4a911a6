"""The page's files: served as they are, and nothing beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from alpaca_lora.server.static_files import StaticFiles
from tests.server.open_server import OpenServer, open_server


@pytest.fixture
def paged(tmp_path: Path) -> Iterator[OpenServer]:
    root = tmp_path / "static"
    (root / "fonts").mkdir(parents=True)
    (root / "index.html").write_text("<!doctype html><title>x</title>")
    (root / "app.js").write_text("export {}")
    (root / "fonts/a.woff2").write_bytes(b"\0\1")
    (root / ".hidden").write_text("secret")
    (tmp_path / "outside.txt").write_text("secret")
    with open_server(app_options={"pages": StaticFiles(root)}) as server:
        yield server


def test_files_are_served_without_a_key(paged: OpenServer) -> None:
    for path, kind in (("/", "text/html"), ("/index.html", "text/html"), ("/app.js", "text/javascript")):
        answer = httpx.get(paged.url + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert httpx.get(paged.url + "/fonts/a.woff2").content == b"\0\1"
    assert httpx.head(paged.url + "/").status_code == 200


def test_a_file_that_is_known_is_not_sent_again(paged: OpenServer) -> None:
    first = httpx.get(paged.url + "/app.js")
    again = httpx.get(paged.url + "/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/.hidden",
        "/../outside.txt",
        "/%2e%2e/outside.txt",
        "/fonts/../../outside.txt",
        "/fonts",
        "/fonts/",
        "/x",
        "//app.js",
    ],
)
def test_nothing_else_is(paged: OpenServer, path: str) -> None:
    host, _, port = paged.url.removeprefix("http://").partition(":")
    with httpx.Client() as client:
        request = client.build_request("GET", f"http://{host}:{port}/")
        request.extensions["target"] = path.encode()
        answer = client.send(request)
    assert answer.status_code == 401 and "secret" not in answer.text


def test_without_a_page_there_is_none(tmp_path: Path) -> None:
    with open_server(app_options={"pages": StaticFiles(tmp_path / "none")}) as server:
        assert server.get("/").status_code == 404


def test_the_description_of_the_api_holds_together(server: OpenServer) -> None:
    described = server.get("/openapi.json").json()
    text = json.dumps(described)
    names = described["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "ClassifyRequest", "ModerationRequest", "AdapterRequest"} <= set(names)
    referred = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert referred and referred <= set(names)
    assert described["security"] == [{"key": []}]
    assert names["ChatRequest"]["additionalProperties"] is False
