"""Check digits: published examples pass, one wrong digit does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_lora.safety.checksums import (
    judge_card,
    judge_chinese_identity,
    judge_iban,
    judge_phone,
    judge_us_ssn,
    luhn,
)

CARDS = [
    "4111111111111111",
    "5555555555554444",
    "378282246310005",
    "6011111111111117",
    "3530111333300000",
    "30569309025904",
]
IBANS = [
    "GB82WEST12345698765432",
    "DE89370400440532013000",
    "FR1420041010050500013M02606",
    "NO9386011117947",
    "CH9300762011623852957",
]


@pytest.mark.parametrize("card", CARDS)
def test_cards(card: str) -> None:
    assert judge_card(card) == len(card)
    spaced = " ".join(card[i : i + 4] for i in range(0, len(card), 4))
    assert judge_card(spaced) == len(spaced)
    assert judge_card(spaced + " 12") == len(spaced)  # a date behind it is no part of it
    for place in range(len(card)):
        wrong = card[:place] + str((int(card[place]) + 1) % 10) + card[place + 1 :]
        assert not luhn(wrong) and judge_card(wrong) == 0


@given(st.text(st.sampled_from("0123456789"), min_size=1, max_size=18))
def test_luhn_has_one_check_digit(digits: str) -> None:
    assert sum(luhn(digits + str(last)) for last in range(10)) == 1


def test_a_number_that_no_bank_gives_is_no_card() -> None:
    assert judge_card("0000000000000000") == 0
    assert judge_card("7992739871300000") == 0  # Luhn's digit fits, nobody issues 79


@pytest.mark.parametrize("iban", IBANS)
def test_ibans(iban: str) -> None:
    assert judge_iban(iban) == len(iban)
    spaced = " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))
    assert judge_iban(spaced + " AND") == len(spaced)
    assert judge_iban(iban[:-1]) == 0
    assert judge_iban(iban + "9") == 0
    assert judge_iban(iban[:-1] + ("1" if iban[-1] != "1" else "2")) == 0
    assert judge_iban("XX" + iban[2:]) == 0


@pytest.mark.parametrize("number", ["11010519491231002X", "440524188001010014"])
def test_chinese_identity_numbers(number: str) -> None:
    assert judge_chinese_identity(number) == 18
    assert judge_chinese_identity(number.lower()) == 18
    assert judge_chinese_identity(number[:-1] + ("0" if number[-1] != "0" else "1")) == 0
    assert judge_chinese_identity(number[:10] + "0230" + number[14:]) == 0  # the 30th of February


def test_social_security_numbers() -> None:
    assert judge_us_ssn("219-09-9999") == 11
    for never in ("000-12-3456", "666-12-3456", "900-12-3456", "219-00-9999", "219-09-0000"):
        assert judge_us_ssn(never) == 0


def test_phones() -> None:
    assert judge_phone("+44 20 7946 0958")
    assert not judge_phone("+1 23 456")
    assert not judge_phone("+11 1111 1111")
