"""Personal data by its form: what it is called in a policy, the expression of candidates, the judge of a candidate."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from alpaca_lora.safety.checksums import (
    judge_card,
    judge_chinese_identity,
    judge_iban,
    judge_phone,
    judge_us_ssn,
)
from alpaca_lora.safety.matcher import Accept, PatternMatcher
from alpaca_lora.safety.pattern import parse_pattern


class Entity(NamedTuple):
    """One form of personal data."""

    pattern: str
    accept: Accept | None = None


ENTITIES = MappingProxyType({
    "email": Entity(r"[A-Za-z0-9](?:[A-Za-z0-9._%+\-]{0,63})@(?:[A-Za-z0-9\-]{1,63}\.){1,4}[A-Za-z]{2,24}"),
    "phone_cn": Entity(
        r"(?:\+86[ \-]?|\b86[ \-]?|\b0086[ \-]?|\b)1[3-9]\d[ \-]?\d{4}[ \-]?\d{4}\b"
        r"|(?:\b0\d{2,3}[\- ]|\(0\d{2,3}\) ?)[2-9]\d{6,7}\b"
    ),
    "phone": Entity(
        r"\+[1-9]\d{0,2}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{1,4}(?:[ .\-]?\d{2,4}){1,4}\b"
        r"|(?:\+?\b1[ .\-])?(?:\([2-9]\d{2}\) ?|\b[2-9]\d{2}[ .\-])[2-9]\d{2}[.\-]\d{4}\b",
        judge_phone,
    ),
    "identity_cn": Entity(
        r"\b[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]\b", judge_chinese_identity
    ),
    "bank_card": Entity(r"\b[2-6](?:[ \-]?\d){12,18}\b", judge_card),
    "iban": Entity(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", judge_iban),
    "us_ssn": Entity(r"\b\d{3}-\d{2}-\d{4}\b", judge_us_ssn),
})  # fmt: skip


def entity_matcher(name: str) -> PatternMatcher:
    """The matcher of one of `ENTITIES`."""
    entity = ENTITIES[name]
    return PatternMatcher(parse_pattern(entity.pattern), accept=entity.accept)
