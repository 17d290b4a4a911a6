"""A policy: the rules of a file, and what they say of a text. Immutable; one policy serves any number of streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType

from alpaca_lora.safety.classifier import Classifier
from alpaca_lora.safety.lane import LanePlan, plan_lanes
from alpaca_lora.safety.policy_file import BUNDLED, read_rules
from alpaca_lora.safety.rail import StreamRail
from alpaca_lora.safety.rule import Rule
from alpaca_lora.safety.verdict import SIDES, Side, Verdict

NO_CLASSIFIERS: Mapping[str, Classifier] = MappingProxyType({})


@dataclass(frozen=True)
class _RulesOfSide:
    """The rules that look at the texts of one side, and their matchers in lanes."""

    rules: tuple[Rule, ...]
    lanes: tuple[LanePlan, ...]

    @classmethod
    def of(cls, side: Side, rules: Sequence[Rule]) -> _RulesOfSide:
        chosen = tuple(rule for rule in rules if rule.acts_on(side))
        return cls(chosen, plan_lanes((i, matcher) for i, rule in enumerate(chosen) for matcher in rule.matchers))


class Policy:
    """The rules that are switched on, in the order of the file."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._by_side = {side: _RulesOfSide.of(side, rules) for side in SIDES}

    @classmethod
    def from_file(cls, path: str | PathLike[str], classifiers: Mapping[str, Classifier] = NO_CLASSIFIERS) -> Policy:
        """The policy of a file. ``classifiers``: by the names that its rules call them. ConfigError with file and line
        of everything that is wrong in it; MachineError when the packages that search are not installed.
        """
        return cls(read_rules(Path(path), classifiers))

    @classmethod
    def bundled(cls) -> Policy:
        """The policy that comes with the package, in English and Chinese."""
        return cls(read_rules(BUNDLED, NO_CLASSIFIERS))

    def check(self, text: str, side: Side) -> Verdict:
        """The verdict on a whole text. What comes after a block is in the findings and not in the verdict's text."""
        chosen = self._by_side[side]
        released = StreamRail(chosen.rules, chosen.lanes, whole=True).flush(text)
        return released.verdict or Verdict("allow", released.text)

    def stream(self, side: Side) -> StreamRail:
        """A rail for a text that comes in pieces; what it releases, put together, is the text of `check`."""
        chosen = self._by_side[side]
        return StreamRail(chosen.rules, chosen.lanes)

    def categories(self) -> tuple[str, ...]:
        """All categories that a finding can have, each once."""
        return tuple(dict.fromkeys(rule.category for rule in self.rules))

    def most_held(self, side: Side) -> dict[str, int]:
        """Rule -> the characters that a stream holds back for it at most, counted as the rule sees them."""
        return {rule.id: rule.most_held for rule in self._by_side[side].rules}
