"""The audit record of a verdict: what was done and why, and nothing of what was said."""

from __future__ import annotations

import datetime
import json
from collections import Counter

from alpaca_lora.safety.verdict import Side, Verdict

MAX_ID = 128  # characters of a request's id, which may come from outside


def audit_line(
    verdict: Verdict, *, request_id: str, side: Side, num_characters: int, time: datetime.datetime | None = None
) -> str:
    """One line of JSON without a line break: time (UTC), request id, side, action, how often each rule matched, the
    lengths of the text before and after. No text, no place in it, no message.
    """
    moment = time or datetime.datetime.now(datetime.UTC)
    return json.dumps({
        "time": moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds"), "request_id": request_id[:MAX_ID],
        "side": side, "action": verdict.action, "rules": Counter(finding.rule for finding in verdict.findings),
        "characters": num_characters, "characters_after": len(verdict.text),
    })  # fmt: skip
