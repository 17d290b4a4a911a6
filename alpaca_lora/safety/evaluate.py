"""Precision and recall of a policy on a labelled set, for each category and language.

    python -m alpaca_lora.safety.evaluate FILE.jsonl [--policy POLICY.yml] [--misses]

A text counts once for a category, however often it is found in it. Precision is the share of texts that have the
category among those in which it was found, over the whole set with its benign texts; recall the share of those in which
it was found among those that have it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.safety.labelled import LabelledText, read_labelled
from alpaca_lora.safety.policy import Policy

ALL = "all"  # every category, or every language, together


@dataclass(frozen=True, slots=True)
class Score:
    """Texts of one category and language: found rightly, found wrongly, missed."""

    right: int = 0
    wrong: int = 0
    missed: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.wrong + other.wrong, self.missed + other.missed)

    @property
    def precision(self) -> float | None:
        """Of what was found; None where nothing was."""
        found = self.right + self.wrong
        return self.right / found if found else None

    @property
    def recall(self) -> float | None:
        """Of what was there; None where nothing was."""
        there = self.right + self.missed
        return self.right / there if there else None


@dataclass(frozen=True, slots=True)
class Miss:
    """A text whose categories were not those that were found."""

    text: LabelledText
    found: frozenset[str]


def evaluate(policy: Policy, texts: Sequence[LabelledText]) -> tuple[dict[tuple[str, str], Score], list[Miss]]:
    """(category, language) -> score, and the texts that were judged wrongly. ``all`` stands for any category (a benign
    text is one in which nothing should be found) and for any language.
    """
    scores: dict[tuple[str, str], Score] = {}
    misses = []
    for text in texts:
        found = frozenset(policy.check(text.text, text.side).categories)
        if found != text.categories:
            misses.append(Miss(text, found))
        counted = {category: _score(category in text.categories, category in found)
                   for category in found | text.categories}  # fmt: skip
        counted[ALL] = _score(bool(text.categories), bool(found))
        for category, score in counted.items():
            for language in (text.language, ALL):
                scores[category, language] = scores.get((category, language), Score()) + score
    return scores, misses


def _score(there: bool, found: bool) -> Score:
    return Score(int(there and found), int(found and not there), int(there and not found))


def table(scores: Mapping[tuple[str, str], Score]) -> Table:
    """Precision and recall of every category, a pair of columns for each language."""
    languages = [*_names(language for _, language in scores), ALL]
    result = Table(title="precision / recall (texts)", title_justify="left", box=None, pad_edge=False)
    result.add_column("category")
    for language in languages:
        result.add_column(language, justify="right")
    for category in [*_names(category for category, _ in scores), ALL]:
        cells = [_cell(scores.get((category, language))) for language in languages]
        result.add_row(category, *cells, style="bold" if category == ALL else None)
    return result


def _names(names: Iterable[str]) -> list[str]:
    return sorted(set(names) - {ALL})


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    precision, recall = ("-" if share is None else f"{share:.2f}" for share in (score.precision, score.recall))
    return f"{precision} / {recall} ({score.right + score.missed})"


def main(words: Sequence[str] | None = None) -> int:
    """Print the table, and with ``--misses`` the texts that were judged wrongly; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m alpaca_lora.safety.evaluate", description="measure a policy")
    parser.add_argument("file", type=Path, help="labelled texts, a JSON object on each line")
    parser.add_argument("--policy", type=Path, help="the policy's file; without it the bundled policy")
    parser.add_argument("--misses", action="store_true", help="also list the texts that were judged wrongly")
    given = parser.parse_args(words)
    try:
        policy = Policy.bundled() if given.policy is None else Policy.from_file(given.policy)
        scores, misses = evaluate(policy, read_labelled(given.file))
    except AlpacaLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table(scores))
    for miss in misses if given.misses else ():
        there, found = (", ".join(sorted(names)) or "nothing" for names in (miss.text.categories, miss.found))
        console.print(f"{there} was found as {found}: {miss.text.text!r}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
