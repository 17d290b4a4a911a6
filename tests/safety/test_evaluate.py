"""Figures of the bundled policy on the labelled set: at least what docs/safety.md says. The arithmetic by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alpaca_lora.errors import DataError
from alpaca_lora.safety.evaluate import ALL, Score, evaluate, main
from alpaca_lora.safety.labelled import LabelledText, read_labelled
from alpaca_lora.safety.policy import Policy
from tests.package_files import CHECKOUT
from tests.safety.policies import written

LABELLED = Path(__file__).parent / "labelled.jsonl"
LINE = '{"text": "a", "language": "en", "side": "input", "categories": []}\n'


def documented() -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """(category, language) -> precision and recall of the table in docs/safety.md."""
    page = (CHECKOUT / "docs" / "safety.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\| (.+) \|$", page.split("## What it finds", 1)[1], re.MULTILINE)
    languages = [cell.strip() for cell in head.split("|")][1:]
    figures = {}
    for row in rows:
        category, *cells = (cell.strip().strip("`") for cell in row.split("|"))
        for language, cell in zip(languages, cells, strict=True):
            if cell != "-":
                parts = re.match(r"(\S+) / (\S+) \(", cell)
                assert parts is not None, cell
                figures[category, language] = tuple(None if part == "-" else float(part) for part in parts.groups())
    return figures


def test_the_labelled_set_is_what_it_should_be() -> None:
    texts = read_labelled(LABELLED)
    benign = [text for text in texts if not text.categories]
    assert len(texts) >= 300 and len({text.text for text in texts}) == len(texts)
    assert len(benign) >= len(texts) / 2
    for language in ("en", "zh"):
        assert sum(text.language == language for text in texts) >= 150
    known = set(Policy.bundled().categories())
    assert {category for text in texts for category in text.categories} == known


def test_the_bundled_policy_is_as_good_as_the_page_says() -> None:
    scores, _ = evaluate(Policy.bundled(), read_labelled(LABELLED))
    said = documented()
    assert set(said) == set(scores)
    for key, (precision, recall) in said.items():
        for name, least, value in (
            ("precision", precision, scores[key].precision),
            ("recall", recall, scores[key].recall),
        ):
            assert (least is None) == (value is None), key
            assert least is None or value is None or value >= least - 0.005, f"{name} of {key}: {value} < {least}"


def test_scores(tmp_path: Path) -> None:
    policy = Policy.from_file(written(tmp_path, "rules:\n  - {id: w, kind: words, action: flag, words: blue}\n"))
    texts = [
        LabelledText("blue", "en", "input", frozenset({"words"})),
        LabelledText("azure", "en", "input", frozenset({"words"})),
        LabelledText("blue blue", "de", "input", frozenset()),
        LabelledText("red", "de", "output", frozenset()),
    ]
    scores, misses = evaluate(policy, texts)
    assert scores["words", "en"] == Score(right=1, missed=1)
    assert scores["words", ALL] == scores[ALL, ALL] == Score(1, 1, 1)
    assert (scores["words", ALL].precision, scores["words", ALL].recall) == (0.5, 0.5)
    assert (scores["words", "de"].precision, scores["words", "de"].recall) == (0.0, None)
    assert [miss.text.text for miss in misses] == ["azure", "blue blue"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy = written(tmp_path, "rules:\n  - {id: w, kind: words, action: flag, words: a}\n")
    lines = tmp_path / "x.jsonl"
    lines.write_text(LINE + LINE.replace('"a"', '"b"'))
    assert main([str(lines), "--policy", str(policy), "--misses"]) == 0
    said = capsys.readouterr().out
    assert "0.00 / - (0)" in said and "nothing was found as words: 'a'" in said
    assert main([str(tmp_path / "none.jsonl"), "--policy", str(policy)]) == 3
    assert "none.jsonl: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: is not JSON"),
        ("[]", ":2: has other keys"),
        (LINE.replace("text", "words"), ":2: has other keys"),
        (LINE.replace('"a"', "1"), ":2: text and language are not text"),
        (LINE.replace("input", "both"), ":2: side: 'both' is not possible"),
        (LINE.replace("[]", '"x"'), ":2: categories: is not possible"),
    ],
)
def test_a_line_that_is_none(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(LINE + line)
    with pytest.raises(DataError, match=re.escape(said)):
        read_labelled(path)


def test_a_file_without_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no line"):
        read_labelled(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="byte 0 is not UTF-8"):
        read_labelled(path)
