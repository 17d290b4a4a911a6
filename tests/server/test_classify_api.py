"""Labels over HTTP: the classifier's own reading of texts, through the same engine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.server.open_server import OpenServer


def ask(server: OpenServer, texts: Any, **fields: Any) -> Any:
    return server.post("/v1/classify", {"model": "sentiment", "input": texts, **fields})


def test_labels_and_probabilities(server: OpenServer) -> None:
    answer = ask(server, ["a good film", "x" * 100]).json()
    assert [one["label"] for one in answer["data"]] == ["good", "good"]
    first, second = answer["data"]
    good = 1 / (1 + math.exp(-2))
    assert first["probabilities"] == pytest.approx({"good": good, "bad": 1 - good})
    assert list(first["probabilities"]) == ["good", "bad"] and first["num_classes"] == 2
    assert (first["truncated"], second["truncated"]) == (False, True)  # cut at the training's 32 tokens
    assert answer["usage"] == {"prompt_tokens": 13 + 32, "completion_tokens": 0, "total_tokens": 45}
    last = server.engine.seen[-1]
    assert (last.kind, last.adapter, last.prompt_ids[-1]) == ("classify", "sentiment", 257)  # EOS, as in training


def test_one_text(server: OpenServer) -> None:
    assert [one["index"] for one in ask(server, "a film").json()["data"]] == [0]


@pytest.mark.parametrize("texts", ["", " ", ["a", ""], [], None, 5, [5], {}, ["a"] * 129])
def test_inputs_that_cannot_be(server: OpenServer, texts: Any) -> None:
    answer = ask(server, texts)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("input")


def test_a_model_that_writes_does_not_classify(server: OpenServer) -> None:
    answer = ask(server, "x", model="shop")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert ask(server, "x", model="nobody").status_code == 404
    assert ask(server, "x", top_k=1).status_code == 400
