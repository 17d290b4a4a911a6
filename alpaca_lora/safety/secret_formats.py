"""Secrets by their form: keys that carry their maker's mark, private keys, tokens, passwords in addresses.

The marks are those that the makers document, so that leaked keys can be found. A secret without a mark is not found.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from alpaca_lora.safety.checksums import judge_key
from alpaca_lora.safety.matcher import Accept, PatternMatcher
from alpaca_lora.safety.pattern import parse_pattern


class Format(NamedTuple):
    """One form of a secret. ``tail`` stretches a match over the rest of it."""

    pattern: str
    tail: str | None = None
    accept: Accept | None = None


_WORD = r"[A-Za-z0-9_\-]"
_LINE = r"(?:\s|\\r|\\n){0,4}"
_KEY_KIND = r"(?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?"

FORMATS = MappingProxyType({
    "private_key": Format(
        rf"-----BEGIN {_KEY_KIND}-----",
        rf"{_LINE}[A-Za-z0-9+/]{{20,100}}={{0,2}}"
        rf"|{_LINE}(?:Proc-Type|DEK-Info|Version|Comment): [^\r\n\\]{{0,100}}"
        rf"|{_LINE}[A-Za-z0-9+/]{{0,24}}={{0,2}}{_LINE}(?:=[A-Za-z0-9+/]{{4}})?{_LINE}-----END {_KEY_KIND}-----",
    ),
    "jwt": Format(rf"\beyJ{_WORD}{{8,400}}\.eyJ{_WORD}{{4}}", r"[A-Za-z0-9_\-.]"),
    "openai": Format(rf"\bsk-(?:proj-|ant-|svcacct-|admin-|or-)?{_WORD}{{20}}", _WORD, judge_key),
    "aws": Format(r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}\b"),
    "google": Format(rf"\bAIza{_WORD}{{35}}"),
    "github": Format(r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{22}", r"[A-Za-z0-9_]"),
    "gitlab": Format(rf"\bglpat-{_WORD}{{20}}", _WORD),
    "slack": Format(r"\bxox[abeoprs]-[A-Za-z0-9\-]{10}", r"[A-Za-z0-9\-]"),
    "stripe": Format(r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16}", "[A-Za-z0-9]"),
    "huggingface": Format(r"\bhf_[A-Za-z0-9]{30}", "[A-Za-z0-9]"),
    "npm": Format(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "pypi": Format(rf"\bpypi-AgEIcHlwaS5vcmc{_WORD}{{10}}", _WORD),
    "sendgrid": Format(rf"\bSG\.{_WORD}{{16,32}}\.{_WORD}{{16}}", _WORD),
    "telegram": Format(rf"\b\d{{8,10}}:AA{_WORD}{{33}}\b"),
    "aliyun": Format(r"\bLTAI[A-Za-z0-9]{12,20}\b"),
    "tencent": Format(r"\bAKID[A-Za-z0-9]{13,40}\b"),
    "url_password": Format(r"\b[a-z][a-z0-9+.\-]{1,20}://[^\s:/@]{1,64}:[^\s:/@]{1,64}@"),
})  # fmt: skip


def format_matcher(name: str) -> PatternMatcher:
    """The matcher of one of `FORMATS`."""
    chosen = FORMATS[name]
    tail = None if chosen.tail is None else parse_pattern(chosen.tail)
    return PatternMatcher(parse_pattern(chosen.pattern), tail=tail, accept=chosen.accept)
