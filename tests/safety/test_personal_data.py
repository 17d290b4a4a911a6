"""Forms of personal data and secrets: what is taken and what is left, to the character."""

from __future__ import annotations

import pytest

from alpaca_lora.safety.personal_data import ENTITIES, entity_matcher
from alpaca_lora.safety.secret_formats import FORMATS, format_matcher
from tests.safety.matching import every_way

PERSONAL = [
    ("email", "a.b+c@x-y.co.uk, @handle a@b a@b.c x@y.io.", ["a.b+c@x-y.co.uk", "x@y.io"]),
    ("email", "邮箱li.na@163.com，好", ["li.na@163.com"]),
    ("phone_cn", "电话13812345678或+86 139-1234-5678。12345678901", ["13812345678", "+86 139-1234-5678"]),
    ("phone_cn", "010-62785001 (021)58881234 138123456789", ["010-62785001", "(021)58881234"]),
    ("phone", "+44 20 7946 0958; (415) 555-2671, 212-555-0187", ["+44 20 7946 0958", "(415) 555-2671", "212-555-0187"]),
    ("phone", "1990-2000 192.168.1.1 3.14159265 123-456-789 978-3-16-148410-0", []),
    ("identity_cn", "身份证11010519491231002X。110105194912310021", ["11010519491231002X"]),
    ("bank_card", "1 4111 1111 1111 1111 12/28, 4111111111111112", ["4111 1111 1111 1111"]),
    ("bank_card", "378282246310005;5555-5555-5555-4444", ["378282246310005", "5555-5555-5555-4444"]),
    ("iban", "GB82 WEST 1234 5698 7654 32 AND DE89370400440532013001", ["GB82 WEST 1234 5698 7654 32"]),
    ("us_ssn", "219-09-9999 000-12-3456 1219-09-9999", ["219-09-9999"]),
]
BODY = "MIIEowIBAAKCAQEAw7vN3f0Xq1m2Zr8kTg5yUe9oPqLs4HdFjKzXcVbNmQwErTyU"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n{BODY}\nabcd==\n-----END RSA PRIVATE KEY-----"
SECRETS = [
    ("private_key", f"key:\n{PEM}\nHello again", [PEM]),
    ("private_key", PEM.replace("\n", r"\n") + " and on", [PEM.replace("\n", r"\n")]),
    ("private_key", "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----", []),
    ("jwt", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-_9 next", ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-_9"]),
    (
        "openai",
        "sk-proj-a8Fh2kLm9QxT4vWz7YbN3cRd5eGs, sk-a-class-of-words-only",
        ["sk-proj-a8Fh2kLm9QxT4vWz7YbN3cRd5eGs"],
    ),
    ("aws", "AKIAIOSFODNN7EXAMPLE AKIAIOSFODNN7EXAMPLES", ["AKIAIOSFODNN7EXAMPLE"]),
    ("github", "ghp_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8x ghp_short", ["ghp_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8x"]),
    ("url_password", "postgres://u:p4ss@db/x http://host:80/a@b", ["postgres://u:p4ss@"]),
]


@pytest.mark.parametrize(("name", "text", "expected"), PERSONAL)
def test_personal_data(name: str, text: str, expected: list[str]) -> None:
    assert every_way(entity_matcher(name), text) == expected


@pytest.mark.parametrize(("name", "text", "expected"), SECRETS)
def test_secrets(name: str, text: str, expected: list[str]) -> None:
    assert every_way(format_matcher(name), text) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("google", "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY"),
        ("gitlab", "glpat-Zx9kQm3LtR7vWp2YbNc4"),
        ("slack", "xoxb-123456789012-abcdefABCDEF"),
        ("stripe", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"),
        ("huggingface", "hf_" + "aB3" * 12),
        ("npm", "npm_" + "aB3" * 12),
        ("pypi", "pypi-AgEIcHlwaS5vcmcCJDEyMzQ1Njc4"),
        ("sendgrid", "SG.aBcDeFgHiJkLmNoPqRsTuV.aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"),
        ("telegram", "123456789:AA" + "bC4" * 11),
        ("aliyun", "LTAI5tKx8mQz3NvB7wYc2RdF"),
        ("tencent", "AKIDz8krbsJ5yKBZQpn74WFkmLPx3gnPhESA"),
    ],
)
def test_keys_of_each_maker(name: str, text: str) -> None:
    assert every_way(format_matcher(name), f"key {text} end") == [text]
    assert every_way(format_matcher(name), f"key {text[:8]} end") == []


def test_every_form_is_tested() -> None:
    assert {name for name, *_ in PERSONAL} == set(ENTITIES)
    tested = {name for name, *_ in SECRETS} | {mark.args[1][i][0] for mark in test_keys_of_each_maker.pytestmark
                                               for i in range(len(mark.args[1]))}  # fmt: skip
    assert tested == set(FORMATS)
