"""A classifier as a judge: the same pieces however a text comes, each character judged, one piece held at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.errors import ConfigError
from alpaca_lora.safety.classifier import PieceJudge, Pieces
from alpaca_lora.safety.policy import Policy
from tests.safety.policies import written

RULE = """
rules:
  - {{id: toxic, kind: classifier, classifier: ours, label: bad, threshold: 0.6, window: 32, action: {action}}}
"""


def shouting(texts: Sequence[str]) -> list[Mapping[str, float]]:
    """Bad is what has an exclamation mark."""
    return [{"bad": 0.9 if "!" in text else 0.1} for text in texts]


@given(st.text(st.sampled_from("ab!"), max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_pieces_do_not_depend_on_the_cuts(text: str, cuts: list[int]) -> None:
    seen: list[str] = []

    def classify(texts: Sequence[str]) -> list[Mapping[str, float]]:
        seen.extend(texts)
        return shouting(texts)

    judge = PieceJudge("ours", classify, "bad", 0.5, 32)
    whole = Pieces(judge).push(text, final=True)
    at_once, seen[:] = list(seen), []
    pieces, spans, places = Pieces(judge), [], sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for first, last in zip(places, [*places[1:], None], strict=True):
        spans += pieces.push(text[first:last], final=last is None)
        assert last is None or 0 <= (last - pieces.at) < 32
    assert (spans, seen) == (whole, at_once)
    assert "!" not in text or spans  # nothing is left out
    assert all(len(piece) <= 32 for piece in seen)


def test_a_rule_with_a_classifier(tmp_path: Path) -> None:
    policy = Policy.from_file(written(tmp_path, RULE.format(action="block")), {"ours": shouting})
    text = "x" * 50 + "!" + "y" * 50
    verdict = policy.check(text, "output")
    assert (verdict.action, verdict.text) == ("block", "x" * 32)
    rail = policy.stream("output")
    shown = "".join(rail.push(character).text for character in text)
    assert rail.blocked and shown == verdict.text
    assert policy.most_held("output") == {"toxic": 32}
    flagged = Policy.from_file(written(tmp_path, RULE.format(action="flag")), {"ours": shouting}).check(text, "input")
    assert (flagged.action, flagged.text, len(flagged.findings)) == ("flag", text, 1)


def test_what_a_classifier_answers_is_checked(tmp_path: Path) -> None:
    path = written(tmp_path, RULE.format(action="flag"))
    with pytest.raises(ConfigError, match="'ours' has no label 'bad', expected one of good"):
        Policy.from_file(path, {"ours": lambda texts: [{"good": 1.0} for _ in texts]}).check("a", "input")
    with pytest.raises(ConfigError, match="gave 0 answers for 1 texts"):
        Policy.from_file(path, {"ours": lambda texts: []}).check("a", "input")


def test_an_empty_text_is_not_asked_about(tmp_path: Path) -> None:
    def never(texts: Sequence[str]) -> list[Mapping[str, float]]:
        raise AssertionError(texts)

    assert (
        Policy.from_file(written(tmp_path, RULE.format(action="flag")), {"ours": never}).check("", "input").text == ""
    )
