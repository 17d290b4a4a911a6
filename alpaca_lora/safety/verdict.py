"""What a check says: findings, a verdict, what a stream releases. Holds places and names, and no rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Side: TypeAlias = Literal["input", "output"]
Action: TypeAlias = Literal["allow", "flag", "redact", "rewrite", "block"]

SIDES: tuple[Side, ...] = get_args(Side)
# from the mildest to the strictest: a verdict's action is the strictest of its findings'
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True, slots=True)
class Finding:
    """Where a rule matched: characters ``start`` to ``end`` (not included) of the text that was given."""

    rule: str
    category: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """``text``: what may be shown, redacted and rewritten; after a block what stood before it. ``message``: of the
    strictest rule, None where nothing was found.
    """

    action: Action
    text: str
    findings: tuple[Finding, ...] = ()
    message: str | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of the findings, each once, in the order of the text."""
        return tuple(dict.fromkeys(finding.category for finding in self.findings))


@dataclass(frozen=True, slots=True)
class Released:
    """Text that is certain now, and the verdict on what was found in it (None: nothing was)."""

    text: str
    verdict: Verdict | None = None


def strictest(actions: Iterable[Action]) -> Action:
    """The strictest of the actions; ``allow`` of none."""
    return ACTIONS[max((ACTIONS.index(action) for action in actions), default=0)]
