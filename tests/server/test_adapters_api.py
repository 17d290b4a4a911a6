"""Loading and unloading adapters with the admin key, from one folder and no other; training reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.open_server import ADMIN_KEY, BASE, KEY, OpenServer, open_server


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[OpenServer]:
    """A server with adapters to load, and a folder beside them that is none of its business."""
    root = tmp_path / "adapters"
    for name in ("one", "two", "broken", "deep/three"):
        (root / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inner-link").symlink_to(root / "one")
    (root / "file").write_text("x")
    with open_server(adapter_dir=str(root)) as server:
        yield server


def load(server: OpenServer, key: str | None = ADMIN_KEY, **fields: Any) -> Any:
    return server.post("/v1/adapters", {"name": "one", **fields}, key)


def test_an_adapter_is_loaded_served_and_unloaded(admin: OpenServer) -> None:
    answer = load(admin)
    assert (answer.status_code, answer.json()["id"]) == (201, "one")
    assert admin.chat(model="one").json()["choices"][0]["message"]["content"].startswith("one heard")
    with admin.http(ADMIN_KEY) as client:
        gone = client.delete("/v1/adapters/one")
        assert gone.json() == {"id": "one", "object": "adapter", "deleted": True}
        assert client.delete("/v1/adapters/one").status_code == 404
    assert admin.chat(model="one").status_code == 404


def test_only_the_admin_may(admin: OpenServer) -> None:
    assert load(admin, KEY).status_code == 403 and load(admin, None).status_code == 401
    with admin.http(KEY) as client:
        assert client.delete("/v1/adapters/shop").status_code == 403
        assert "shop" in [one["id"] for one in client.get("/v1/adapters").json()["data"]]


def test_loading_is_off_without_a_folder(server: OpenServer) -> None:
    answer = load(server)
    assert answer.status_code == 403 and "adapter_dir" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "../outside", "one/../../outside", "/etc", "/", ".", "./", "one/..", "link", "file", "none", "%2e%2e/outside",
        "..%2foutside", "..\\outside", "one\0", "\0", "~", "~root", "one/" * 100 + "x", "o\u200bne", "x" * 512,
        "file/..",
    ],
)  # fmt: skip
def test_paths_that_lead_elsewhere(admin: OpenServer, path: str) -> None:
    answer = load(admin, path=path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path"), answer.text
    assert str(admin.service.options.adapter_dir) not in answer.text


@pytest.mark.parametrize("path", ["one", "./one", "deep/three", "deep/../one", "inner-link", "one/"])
def test_paths_that_stay_inside(admin: OpenServer, path: str) -> None:
    assert load(admin, path=path).status_code == 201


@pytest.mark.parametrize("name", ["", BASE, "x" * 10_000, None, 5, "../x", "a/b", "оne"])
def test_names_that_cannot_be(admin: OpenServer, name: Any) -> None:
    answer = load(admin, name=name, path="one")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name"), answer.text


def test_an_adapter_that_does_not_fit_says_why(admin: OpenServer) -> None:
    answer = load(admin, name="b", path="broken")
    assert answer.status_code == 400 and "rank 8" in answer.json()["error"]["message"]
    assert "b" not in admin.service.models.names()


def test_a_record_that_cannot_be_used_is_not_served(admin: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from alpaca_lora.errors import ModelFileError

    def wrong(loaded: Any) -> Any:
        raise ModelFileError("unknown kind", field="template")

    monkeypatch.setattr(admin.service.models, "of_adapter", wrong)
    assert load(admin).status_code == 400
    assert "one" not in admin.service.models.names()


def test_bodies_are_strict(admin: OpenServer) -> None:
    for fields in ({"pinned": 1}, {"url": "http://x"}, {"path": 5}):
        assert load(admin, **fields).status_code == 400


# ---- reports


def test_a_report(admin: OpenServer, tmp_path: Path) -> None:
    rows = [{"step": step, "train_loss": 1 / step} for step in range(1, 5001)]
    lines = [json.dumps(row) for row in rows] + ['{"step": 5000, "val_loss": NaN}']
    (tmp_path / "adapters/one/metrics.jsonl").write_text("\n".join(lines))
    load(admin)
    with admin.http() as client:
        report = client.get("/v1/adapters/one/report").json()
        assert report["summary"] == {} and report["metrics"][0] == rows[0] and len(report["metrics"]) <= 2001
        assert report["metrics"][-1] == {"step": 5000, "val_loss": None}
        assert client.get("/v1/adapters/shop/report").json() == {
            "object": "adapter.report", "id": "shop", "metrics": [], "summary": {"val_loss": 1.5},
        }  # fmt: skip


def test_there_may_be_no_report(admin: OpenServer, tmp_path: Path) -> None:
    load(admin, name="two")
    (tmp_path / "adapters/two/metrics.jsonl").write_text("{broken")
    with admin.http() as client:
        for name, code in (("two", "no_report"), ("nobody", "adapter_not_found")):
            answer = client.get(f"/v1/adapters/{name}/report")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
