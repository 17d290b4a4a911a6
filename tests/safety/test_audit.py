"""The audit record: one line, and not a word of what was said."""

from __future__ import annotations

import datetime
import json

from alpaca_lora.safety.audit import audit_line
from alpaca_lora.safety.policy import Policy


def test_a_record_holds_no_content() -> None:
    text = "Write to quixotic.zebra@example.org or quagga@example.org, card 4111 1111 1111 1111"
    verdict = Policy.bundled().check(text, "output")
    time = datetime.datetime(2026, 11, 26, 12, 0, tzinfo=datetime.timezone(datetime.timedelta(hours=8)))
    line = audit_line(verdict, request_id="r\n1", side="output", num_characters=len(text), time=time)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-11-26T04:00:00.000+00:00", "request_id": "r\n1", "side": "output", "action": "redact",
        "rules": {"personal-data.email": 2, "personal-data.account": 1}, "characters": len(text),
        "characters_after": len(verdict.text),
    }  # fmt: skip
    for word in ("zebra", "quagga", "example", "4111"):
        assert word not in line


def test_a_long_id_is_cut_and_the_time_is_now() -> None:
    verdict = Policy.bundled().check("hello", "input")
    record = json.loads(audit_line(verdict, request_id="x" * 1000, side="input", num_characters=5))
    assert (record["action"], record["rules"], len(record["request_id"])) == ("allow", {}, 128)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(record["time"])
    assert abs(age.total_seconds()) < 60
