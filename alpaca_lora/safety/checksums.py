"""Tells numbers that somebody was given from digits that look like them: check digits, lengths, impossible values.

Each judge takes a candidate and answers how many of its characters are the number, 0 for none.
"""

from __future__ import annotations

import datetime
import re

_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
_CHECK = "10X98765432"
# country -> characters of its IBAN (SWIFT's registry of IBAN formats)
_IBAN_LENGTHS = {
    length: frozenset(countries.split())
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD FK", 19: "MK SI", 20: "AT BA EE KZ LT LU XK MN",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL OM SO",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC",
        33: "RU",
    }.items()
}  # fmt: skip
# beginnings of card numbers and how many digits such a number has
_CARDS = (
    (re.compile("4"), (13, 16, 19)), (re.compile("5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile("3[47]"), (15,)), (re.compile("3(?:0[0-5]|[689])"), (14,)), (re.compile("35(?:2[89]|[3-8])"), (16,)),
    (re.compile("6(?:011|4[4-9]|5)"), (16, 19)), (re.compile("62"), (16, 17, 18, 19)), (re.compile("50|5[6-8]"), (16,)),
    (re.compile("220[0-4]"), (16,)),
)  # fmt: skip


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def judge_card(candidate: str) -> int:
    """A bank card: a beginning and length that are in use, and Luhn's check digit. It may end before the candidate."""
    places = [place for place, character in enumerate(candidate) if character.isdigit()]
    digits = "".join(candidate[place] for place in places)
    lengths = next((lengths for beginning, lengths in _CARDS if beginning.match(digits)), ())
    for length in reversed(lengths):
        if len(digits) < length or len(set(digits[:length])) == 1:
            continue
        end = places[length - 1] + 1
        if not candidate[end : end + 1].isdigit() and luhn(digits[:length]):
            return end
    return 0


def judge_iban(candidate: str) -> int:
    """An IBAN: the length of its country, and the remainder 1 by 97 (ISO 13616)."""
    length = next((size for size, countries in _IBAN_LENGTHS.items() if candidate[:2] in countries), None)
    if length is None:
        return 0
    places = [i for i, character in enumerate(candidate) if character != " "]
    if len(places) < length:
        return 0
    end = places[length - 1] + 1
    if candidate[end : end + 1].isalnum():
        return 0
    compact = candidate[:end].replace(" ", "")
    number = "".join(str(int(character, 36)) for character in compact[4:] + compact[:4])
    return end if int(number) % 97 == 1 else 0


def judge_chinese_identity(candidate: str) -> int:
    """A Chinese identity number: a day that was, and the check character (GB 11643-1999)."""
    try:
        born = datetime.date(int(candidate[6:10]), int(candidate[10:12]), int(candidate[12:14]))
    except ValueError:
        return 0
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, candidate, strict=False))
    fits = _CHECK[total % 11] == candidate[17].upper() and born.year < 2100
    return len(candidate) if fits else 0


def judge_us_ssn(candidate: str) -> int:
    """A US social security number: none that was never given (000, 666, 900 to 999; group 00; serial 0000)."""
    area, group, serial = candidate.split("-")
    possible = area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
    return len(candidate) if possible else 0


def judge_phone(candidate: str) -> int:
    """An international number: 8 to 15 digits (ITU-T E.164) that are not all the same."""
    digits = re.sub(r"\D", "", candidate)
    return len(candidate) if 8 <= len(digits) <= 15 and len(set(digits)) > 2 else 0


def judge_key(candidate: str) -> int:
    """The beginning of a key that was drawn at random: letters and digits mixed, unlike words with hyphens."""
    body = candidate.rpartition("-")[2] if candidate.count("-") <= 2 else candidate
    return len(candidate) if re.search(r"\d", body) and re.search("[A-Za-z]", body) else 0
