"""A rule: what it looks for, on which side, what is done about it; the options of each kind of rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from alpaca_lora.config import Options
from alpaca_lora.errors import ConfigError, nearest
from alpaca_lora.safety.base64_pieces import Base64Matcher
from alpaca_lora.safety.classifier import Classifier, PieceJudge
from alpaca_lora.safety.fold import Fold
from alpaca_lora.safety.matcher import Matcher, PatternMatcher, finds
from alpaca_lora.safety.pattern import any_of, parse_pattern
from alpaca_lora.safety.personal_data import ENTITIES, entity_matcher
from alpaca_lora.safety.secret_formats import FORMATS, format_matcher
from alpaca_lora.safety.verdict import Action, Side
from alpaca_lora.safety.words import WordMatcher

T = TypeVar("T")
R = TypeVar("R")

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Rule:
    """A rule ready for use. ``replacement`` stands in place of what is redacted or rewritten."""

    id: str
    category: str
    side: Literal["input", "output", "both"]
    action: Action
    message: str
    replacement: str
    matchers: tuple[Matcher, ...] = ()
    judge: PieceJudge | None = None

    @property
    def most_held(self) -> int:
        """Characters (as folded) that a stream holds back for this rule at most."""
        return max((matcher.most_held for matcher in self.matchers), default=self.judge.window if self.judge else 0)

    def acts_on(self, side: Side) -> bool:
        """Whether the rule looks at texts of this side."""
        return self.side in ("both", side)


class RuleOptions(Options):
    """What every rule has."""

    id: str = Field(description="name of the rule: small letters, digits, dots, hyphens")
    kind: str = Field(description="what it looks for")
    side: Literal["input", "output", "both"] = Field("both", description="which texts it looks at")
    action: Literal["flag", "redact", "rewrite", "block"] = Field(description="what is done")
    category: str | None = Field(None, description="what a finding is called; none: the kind")
    message: str | None = Field(None, description="what the user is told")
    replacement: str | None = Field(None, description="stands in place of what was found")
    base64: bool = Field(False, description="look into base64 too")

    @model_validator(mode="after")
    def _check_action(self) -> RuleOptions:
        if not _ID.fullmatch(self.id):
            raise ConfigError(f"{self.id!r} is no id", field="id", expected="small letters, digits, dots and hyphens")
        if self.action == "rewrite" and self.replacement is None:
            raise ConfigError("a rewrite needs a text", field="action", expected="replacement with it")
        if self.action in ("flag", "block") and self.replacement is not None:
            raise ConfigError(f"nothing is replaced by {self.action}", field="replacement", fix="leave it out")
        return self

    def matchers(self) -> list[Matcher]:
        """What the rule looks for. ConfigError with the field that is wrong."""
        return []

    def judge(self, classifiers: Mapping[str, Classifier]) -> PieceJudge | None:
        """The classifier that judges, if one does."""
        return None

    def build(self, classifiers: Mapping[str, Classifier]) -> Rule:
        """The rule. ConfigError with the field that is wrong."""
        found = self.matchers()
        if self.base64:
            found.append(Base64Matcher(tuple(found)))
        category = self.category or self.kind
        message = self.message or f"refused by the content policy: {category}"
        replacement = f"[{category}]" if self.replacement is None else self.replacement
        return Rule(
            self.id, category, self.side, self.action, message, replacement, tuple(found), self.judge(classifiers)
        )


class FoldedOptions(RuleOptions):
    """How the text is folded before it is searched."""

    case: bool = Field(False, description="upper and lower case differ")
    lookalikes: bool = Field(True, description="letters that look like Latin ones are Latin ones")
    whitespace: bool = Field(False, description="spaces and line breaks stay as they are")
    spacing: bool = Field(False, description="also look without the separators between single letters")
    leet: bool = Field(False, description="also look with digits and signs as letters")

    def folds(self) -> list[Fold]:
        """The ways to fold the text: the plain one and, beside it, the one for disguises."""
        plain = Fold(not self.case, self.lookalikes, not self.whitespace)
        if not self.spacing and not self.leet:
            return [plain]
        return [plain, Fold(plain.case, plain.lookalikes, plain.whitespace, leet=self.leet, spacing=self.spacing)]


class AllowingOptions(RuleOptions):
    """What is let pass although it is found."""

    allow: list[str] = Field([], description="texts that are no finding", json_schema_extra={"commas": False})

    def allowing(self, found: Sequence[PatternMatcher]) -> list[Matcher]:
        """The matchers with their exceptions. ConfigError for one that none of them finds: it would do nothing."""
        for text in self.allow:
            if not any(finds(matcher, text) for matcher in found):
                raise ConfigError(
                    f"{text[:60]!r} is not found by this rule", field="allow", expected="texts that it finds",
                    fix="leave it out, or write it as it stands in answers",
                )  # fmt: skip
            if any(finds(matcher.allowing(self.allow), text) for matcher in found):
                raise ConfigError(
                    f"{text[:60]!r} holds more than one finding", field="allow", expected="each text by itself"
                )
        return [matcher.allowing(self.allow) for matcher in found] if self.allow else [*found]


class PatternOptions(AllowingOptions, FoldedOptions):
    """Regular expressions of RE2."""

    patterns: list[str] = Field(min_length=1, description="expressions", json_schema_extra={"commas": False})
    tail: str | None = Field(None, description="expression that stretches a match as often as it fits")

    def matchers(self) -> list[Matcher]:
        pattern = any_of([_in_field("patterns", parse_pattern, source) for source in self.patterns])
        tail = None if self.tail is None else _in_field("tail", parse_pattern, self.tail)
        return self.allowing([
            _in_field("patterns", lambda fold: PatternMatcher(pattern, fold, tail=tail), fold) for fold in self.folds()
        ])  # fmt: skip


class WordOptions(FoldedOptions):
    """A list of words and phrases."""

    words: list[str] = Field(min_length=1, description="words and phrases", json_schema_extra={"commas": False})

    def matchers(self) -> list[Matcher]:
        return [_in_field("words", lambda fold: WordMatcher(self.words, fold), fold) for fold in self.folds()]


class PersonalDataOptions(AllowingOptions):
    """Personal data by its form."""

    entities: list[str] = Field(list(ENTITIES), min_length=1, description="forms of personal data")

    def matchers(self) -> list[Matcher]:
        return self.allowing([entity_matcher(_known("entities", name, ENTITIES)) for name in self.entities])


class SecretOptions(AllowingOptions):
    """Secrets by their form."""

    formats: list[str] = Field(list(FORMATS), min_length=1, description="forms of secrets")

    def matchers(self) -> list[Matcher]:
        return self.allowing([format_matcher(_known("formats", name, FORMATS)) for name in self.formats])


class ClassifierOptions(RuleOptions):
    """A classifier that the program hands in."""

    classifier: str = Field(description="name under which it was handed in")
    label: str = Field(description="the label that is a finding")
    threshold: float = Field(0.5, gt=0, le=1, description="least probability of the label")
    window: int = Field(1024, ge=32, le=65536, description="characters judged together")

    @model_validator(mode="after")
    def _check_whole(self) -> ClassifierOptions:
        if self.action not in ("flag", "block"):
            raise ConfigError("a classifier names no place", field="action", expected="flag or block")
        if self.base64:
            raise ConfigError("a classifier does not look into base64", field="base64", fix="leave it out")
        return self

    def judge(self, classifiers: Mapping[str, Classifier]) -> PieceJudge:
        name = _known("classifier", self.classifier, classifiers)
        return PieceJudge(name, classifiers[name], self.label, self.threshold, self.window)


KINDS: Mapping[str, type[RuleOptions]] = MappingProxyType({
    "patterns": PatternOptions, "words": WordOptions, "personal_data": PersonalDataOptions, "secrets": SecretOptions,
    "classifier": ClassifierOptions,
})  # fmt: skip


def _in_field(field: str, make: Callable[[T], R], value: T) -> R:
    """What ``make`` makes of the value; its ConfigError names the field."""
    try:
        return make(value)
    except ConfigError as error:
        raise ConfigError(error.what, field=field, expected=error.expected, fix=error.fix) from error


def _known(field: str, name: str, names: Mapping[str, object]) -> str:
    if name in names:
        return name
    hint = nearest(name, names)
    raise ConfigError(
        f"{name!r} is not known", field=field, expected=f"one of {', '.join(names)}" if names else "one handed in",
        fix=f"did you mean {hint[0]!r}?" if hint else None,
    )  # fmt: skip
