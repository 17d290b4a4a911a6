"""Policies for tests, written as files."""

from __future__ import annotations

from pathlib import Path

MIXED = r"""
rules:
  - id: word
    kind: words
    action: redact
    replacement: "[w]"
    words: [ab, abc, b a, 中文, cab]
    spacing: true
    leet: true
  - {id: flagged, kind: words, action: flag, words: [ba, 文a]}
  - {id: pattern, kind: patterns, action: rewrite, replacement: "<p>", patterns: ['a{2,4}b', '\bcc?\b', 'b c$']}
  - {id: stretched, kind: patterns, action: redact, patterns: ['1[ab]'], tail: '[ab1]|-2'}
  - {id: encoded, kind: words, action: redact, words: [hello], base64: true}
  - {id: mail, kind: personal_data, action: redact, entities: [email]}
  - {id: card, kind: personal_data, action: redact, entities: [bank_card, phone_cn]}
"""
BLOCKING = MIXED + '  - {id: blocked, kind: words, action: block, words: [bad, 坏], message: "no", leet: true}\n'


def written(folder: Path, text: str, name: str = "policy.yml") -> Path:
    """The path of a policy file with the text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
