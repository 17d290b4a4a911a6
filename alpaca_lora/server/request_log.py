"""The log: one JSON object on one line for each event. Never a prompt, an answer or a key; nothing can break a line."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

LOGGER = "alpaca_lora.server"
AUDIT_LOGGER = "alpaca_lora.audit"


class RequestLog:
    """Writes to the loggers of these names; who listens to them is the command's business."""

    def __init__(self) -> None:
        self._logger, self._audit = logging.getLogger(LOGGER), logging.getLogger(AUDIT_LOGGER)

    def audit(self, line: str) -> None:
        """What a rail found, as `safety.audit.audit_line` has it."""
        self._audit.warning("%s", line)

    def info(self, event: str, **facts: Any) -> None:
        self._write(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._write(logging.WARNING, event, facts)

    def defect(self, error: BaseException, **facts: Any) -> None:
        """An error of ours: its kind and where it was raised, but not its message, which may quote a request."""
        where = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        self._write(logging.ERROR, "defect", {**facts, "error": type(error).__name__, "traceback": where[-20:]})

    def _write(self, level: int, event: str, facts: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            # ensure_ascii: no line separator of any kind is left as it is
            self._logger.log(level, "%s", json.dumps({"event": event, **facts}, ensure_ascii=True, default=str))
