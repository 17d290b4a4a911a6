"""A text on its way past the rules: in pieces or whole, with the same result.

Each matcher says how far it is certain; text before the least of these places is settled. Findings are settled in the
order of the text, so what is released does not depend on where the pieces were cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from alpaca_lora.safety.classifier import Pieces
from alpaca_lora.safety.lane import Lane, LanePlan
from alpaca_lora.safety.rule import Rule
from alpaca_lora.safety.verdict import ACTIONS, Finding, Released, Verdict, strictest


class StreamRail:
    """`push` text as it comes; `flush` at the end. After a block nothing more is looked at and nothing is released.

    ``whole``: findings behind a block are still collected.
    """

    def __init__(self, rules: Sequence[Rule], lanes: Sequence[LanePlan], *, whole: bool = False) -> None:
        self.blocked = False
        self._rules = rules
        self._whole = whole
        self._lanes = [Lane(plan) for plan in lanes]
        self._pieces = [(index, Pieces(rule.judge)) for index, rule in enumerate(rules) if rule.judge is not None]
        self._text = ""  # what may still be released
        self._first = 0  # place of its first character
        self._at = 0  # the place up to which it was released or replaced
        self._num_seen = 0
        self._queue: list[tuple[int, int, int, int]] = []  # start, -strictness, -end, rule
        self._last_ends: dict[int, int] = {}  # rule -> end of its last finding

    def push(self, text: str) -> Released:
        """What may be shown with ``text``."""
        return self._advance(text, final=False)

    def flush(self, text: str = "") -> Released:
        """The rest, at the end of the text, or a whole text at once."""
        return self._advance(text, final=True)

    @property
    def num_held(self) -> int:
        """Characters that came and are neither released nor replaced."""
        return max(self._num_seen - self._at, 0)

    def _advance(self, text: str, *, final: bool) -> Released:
        if self.blocked:
            return Released("")
        self._text += text
        self._num_seen += len(text)
        limit = self._num_seen
        for lane in self._lanes:
            for index, (start, end) in lane.push(text, final):
                self._note(index, start, end)
            limit = min(limit, lane.limit)
        for index, pieces in self._pieces:
            for start, end in pieces.push(text, final):
                self._note(index, start, end)
            limit = min(limit, pieces.at)
        return self._settle(self._num_seen if final else limit)

    def _note(self, index: int, start: int, end: int) -> None:
        self._queue.append((start, -ACTIONS.index(self._rules[index].action), -end, index))

    def _settle(self, limit: int) -> Released:
        """Release what stands before ``limit``, with the findings that begin there."""
        due = sorted(entry for entry in self._queue if entry[0] < limit)
        self._queue = [entry for entry in self._queue if entry[0] >= limit]
        shown: list[str] = []
        found: list[tuple[Rule, Finding]] = []
        for start, _, negative_end, index in due:
            rule, end = self._rules[index], -negative_end
            if start >= self._last_ends.get(index, 0):  # else seen already, folded in another way
                found.append((rule, Finding(rule.id, rule.category, start, end)))
            self._last_ends[index] = max(end, self._last_ends.get(index, 0))
            if self.blocked:
                continue
            if rule.action == "block":
                shown.append(self._release(start))
                self.blocked = True
                if not self._whole:
                    break
            elif rule.action in ("redact", "rewrite"):
                if start >= self._at:
                    shown += (self._release(start), rule.replacement)
                self._at = max(self._at, end)
        if not self.blocked:
            shown.append(self._release(limit))
        self._text, self._first = self._text[self._at - self._first :], self._at
        text = "".join(shown)
        return Released(text, _verdict(text, found) if found else None)

    def _release(self, until: int) -> str:
        text = self._text[self._at - self._first : max(until - self._first, 0)]
        self._at = max(self._at, until)
        return text


def _verdict(text: str, found: Sequence[tuple[Rule, Finding]]) -> Verdict:
    action = strictest(rule.action for rule, _ in found)
    message = next(rule.message for rule, _ in found if rule.action == action)
    return Verdict(action, text, tuple(finding for _, finding in found), message)
