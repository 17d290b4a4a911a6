"""What a rule lets pass: a shop's own contact data, however they are written, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.safety.personal_data import entity_matcher
from alpaca_lora.safety.policy import Policy
from tests.package_files import CHECKOUT
from tests.safety.matching import every_way
from tests.safety.policies import written

OWN = ["+1 212 555 0172", "orders@copper-lantern.example", "+86 138 1234 5678"]


def policy(folder: Path, allow: str) -> Policy:
    rules = "rules:\n  - include: bundled\n"
    for name in ("email", "phone"):
        rules += f"  - id: personal-data.{name}\n    allow: [{allow if name == 'phone' else OWN[1]}]\n"
    return Policy.from_file(written(folder, rules))


def test_own_contact_data_pass_and_others_do_not(tmp_path: Path) -> None:
    shop = policy(tmp_path, f"'{OWN[0]}', '{OWN[2]}'")
    text = "Write to Orders@Copper-Lantern.example or call +1 (212) 555-0172, or 212-555-0172; 电话138-1234-5678。"
    assert shop.check(text, "output").text == text
    bundled = Policy.bundled().check(text, "output").text
    assert bundled == "Write to [email] or call [phone], or [phone]; 电话[phone]。"
    others = "Not xorders@copper-lantern.example, orders@copper-lantern.example.org, +1 212 555 0173 or 13812345679."
    assert shop.check(others, "output").text == "Not [email], [email], [phone] or [phone]."
    stream = shop.stream("output")
    pieces = [stream.push(character).text for character in text + others]
    assert "".join(pieces) + stream.flush().text == text + shop.check(others, "output").text


@pytest.mark.parametrize(
    ("entity", "text", "expected"),
    [
        ("email", "a@b.example orders@copper-lantern.example b@b.example", ["a@b.example", "b@b.example"]),
        ("phone", "+1 212 555 0172 +1 212 555 0173 +44 20 7946 0958", ["+1 212 555 0173", "+44 20 7946 0958"]),
        ("phone", "+１２１２５５５０１７２ (212) 555-0172", []),
        ("phone_cn", "13812345678 13912345678", ["13912345678"]),
    ],
)
def test_every_cut_gives_the_same(entity: str, text: str, expected: list[str]) -> None:
    assert every_way(entity_matcher(entity).allowing(OWN), text) == expected


def test_exceptions_of_expressions_and_secrets_and_in_base64(tmp_path: Path) -> None:
    known = "AKIAIOSFODNN7EXAMPLE"
    rules = f"""
rules:
  - {{id: ticket, kind: patterns, action: redact, patterns: ['ticket-\\d{{4,8}}'], allow: [TICKET-0000], leet: true}}
  - {{id: keys, kind: secrets, action: redact, formats: [aws], allow: [{known}], base64: true}}
"""
    found = Policy.from_file(written(tmp_path, rules))
    assert found.check(f"ticket-0000 ticket-0001 {known}", "input").text == f"ticket-0000 [patterns] {known}"
    encoded = "a2V5IEFLSUFJT1NGT0ROTjdFWEFNUExF"  # key AKIAIOSFODNN7EXAMPLE
    assert found.check(encoded, "input").action == "allow"
    assert found.check("AKIAIOSFODNN7EXAMPLX", "input").text == "[secrets]"


@pytest.mark.parametrize(
    ("allow", "words"),
    [
        ("'555 0172'", "'555 0172' is not found by this rule"),
        ("''", "'' is not found by this rule"),
        ("'+1 212 555 0172 or +1 212 555 0173'", "holds more than one finding"),
    ],
)
def test_exceptions_that_would_do_nothing_are_told(tmp_path: Path, allow: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        policy(tmp_path, allow)
    assert caught.value.field == "allow" and caught.value.line == 6


def test_the_shops_policy_of_the_examples() -> None:
    shop = Policy.from_file(CHECKOUT / "examples/shop/policy.yml")
    own = "Call +1 212 555 0172 or write to orders@copper-lantern.example."
    assert shop.check(own, "output").text == own
    assert (
        shop.check("A customer: +1 212 555 0199, ann@mail.example.", "output").text == "A customer: [phone], [email]."
    )
