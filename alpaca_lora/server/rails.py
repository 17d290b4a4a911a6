"""The safety room as the routes see it: texts of a request in, a ruling out. Where no policy is, everything passes.

Checks may take time (a classifier among the rules): call them in a worker, never on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from alpaca_lora.safety.verdict import Released, Side, Verdict

REFUSAL = "This content was refused by the server's policy."


class RailStream(Protocol):
    """One text that comes in pieces; what is released is final."""

    def push(self, text: str) -> Released: ...
    def flush(self) -> Released: ...


class Policy(Protocol):
    """What this room asks of a policy."""

    def check(self, text: str, side: Side) -> Verdict: ...
    def stream(self, side: Side) -> RailStream: ...
    def categories(self) -> tuple[str, ...]: ...


PolicyOf = Callable[[str | None], Policy | None]  # of an adapter by its name, of the base by None


class Note(NamedTuple):
    """For the audit: what was found in so many characters of which side."""

    verdict: Verdict
    side: Side
    num_characters: int


@dataclass(frozen=True, slots=True)
class Ruling:
    """text: what may go on. refusal: what the client is told when nothing more may. changed: the text is not what it
    was. notes: of what was found.
    """

    text: str
    refusal: str | None = None
    changed: bool = False
    notes: tuple[Note, ...] = ()


class Rails:
    """The policy of one request's model."""

    def __init__(self, policy: Policy | None) -> None:
        self._policy = policy

    @property
    def are_there(self) -> bool:
        return self._policy is not None

    def check_input(self, text: str) -> Ruling:
        if self._policy is None:
            return Ruling(text)
        verdict = self._policy.check(text, "input")
        return _ruling(verdict.text, verdict, "input", len(text))

    def open_output(self) -> OutputRail | None:
        """The rail of one answer; None where nothing is checked."""
        return None if self._policy is None else OutputRail(self._policy.stream("output"))

    def moderate(self, text: str) -> tuple[Verdict, tuple[str, ...]]:
        """What the input rail finds in a text, and all categories that there are."""
        if self._policy is None:
            return Verdict("allow", text), ()
        return self._policy.check(text, "input"), self._policy.categories()


class OutputRail:
    """One answer on its way out."""

    def __init__(self, stream: RailStream) -> None:
        self._stream = stream

    def advance(self, text: str, *, is_last: bool) -> Ruling:
        """What can be sent now that ``text`` has come. After a refusal nothing more may be asked."""
        pushed = self._stream.push(text)
        ruling = _ruling(pushed.text, pushed.verdict, "output", len(text))
        if not is_last or ruling.refusal is not None:
            return ruling
        rest = self._stream.flush()
        last = _ruling(rest.text, rest.verdict, "output", 0)
        return Ruling(
            ruling.text + last.text, last.refusal, ruling.changed or last.changed, (*ruling.notes, *last.notes)
        )


def _ruling(text: str, verdict: Verdict | None, side: Side, num_characters: int) -> Ruling:
    """``text``: what is released; a verdict of None or ``allow`` found nothing."""
    if verdict is None or verdict.action == "allow":
        return Ruling(text)
    refusal = (verdict.message or REFUSAL) if verdict.action == "block" else None
    changed = verdict.action in ("redact", "rewrite", "block")
    return Ruling(text, refusal, changed, (Note(verdict, side, num_characters),))
