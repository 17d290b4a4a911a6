"""What a client is told when something is wrong: OpenAI's error object, a status, perhaps when to come back.

An `ApiError` never leaves this room; what the other rooms raise (`alpaca_lora.errors`) becomes one here.
"""

from __future__ import annotations

import math
from typing import Any

from alpaca_lora.errors import AlpacaLoraError, DataError, MachineError, UserError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer other than success.

    kind: OpenAI's ``type``; param: the field that is at fault; code: a word for programs; retry_after: seconds.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, where the error passes with time; a new connection where keys are wanted."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A field that cannot be: 400."""
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="insufficient_permissions")


def unknown_model(name: str) -> ApiError:
    return ApiError(
        404, f"The model {name[:200]!r} does not exist; /v1/models lists those that do", param="model",
        code="model_not_found",
    )  # fmt: skip


def too_many(message: str, retry_after: float, code: str = "rate_limit_exceeded") -> ApiError:
    """A limit that passes with time: 429."""
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after=retry_after)


def unavailable(message: str, code: str, retry_after: float | None = None) -> ApiError:
    """The service cannot answer now, whoever asks: 503."""
    return ApiError(503, message, kind="server_error", code=code, retry_after=retry_after)


def too_late(seconds: float) -> ApiError:
    """The request's deadline passed: 504."""
    return ApiError(
        504, f"The answer was not finished within {seconds:g} seconds", kind="server_error", code="deadline_exceeded"
    )


def internal() -> ApiError:
    """A defect of ours. What it was stands in the log, not in the answer."""
    return ApiError(500, "The server had an error; its log has the request id", kind="server_error", code="internal")


def of_error(error: AlpacaLoraError, *, param: str | None = None) -> ApiError:
    """What the other rooms raise, as a client should see it: its own faults as they are, ours without their insides."""
    if isinstance(error, MachineError):
        return unavailable(error.what, "machine")
    if isinstance(error, UserError | DataError):
        told = AlpacaLoraError(error.what, field=error.field, expected=error.expected, fix=error.fix)
        return invalid(str(told), param or error.field)
    return internal()
