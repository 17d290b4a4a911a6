"""What stands around every answer: the request's id, security headers, a line in the log, an answer to our defects."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alpaca_lora.server.errors import ApiError, internal
from alpaca_lora.server.json_body import ClientGone
from alpaca_lora.server.request_log import RequestLog

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_HEAD_BYTES = 32_768
PROBED = frozenset(("/health", "/ready", "/metrics"))  # asked every few seconds: only what is wrong is logged
# the page brings its own script and style and nothing else; it can be put into no other page
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = (
    ("content-security-policy", POLICY), ("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"), ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)  # fmt: skip


class Frame:
    """ASGI middleware, the outermost. ``scope["state"]["facts"]`` is what routes want the log to say."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = _request_id(scope)
        facts: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["request_id"], state["facts"] = request_id, facts

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("cache-control", "no-store")
                for name, value in SECURITY_HEADERS:
                    headers[name] = value
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
                error = ApiError(431, f"The head is larger than {MAX_HEAD_BYTES:,} bytes", code="head_too_large")
                await error_response(error)(scope, receive, send_framed)
                return
            await self._app(scope, receive, send_framed)
        except ClientGone:
            facts["gone"] = True
        except Exception as error:
            self._log.defect(error, request_id=request_id)
            if status == 0:
                await error_response(internal())(scope, receive, send_framed)
        finally:
            if status != 200 or scope["path"] not in PROBED:
                milliseconds = round(1000 * (time.perf_counter() - start), 1)
                self._log.info(
                    "request", request_id=request_id, method=scope["method"][:16], path=scope["path"][:200],
                    status=status, ms=milliseconds, key=getattr(state.get("caller"), "name", None), **facts,
                )  # fmt: skip


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.to_json(), error.status, headers=error.headers)


def _request_id(scope: Scope) -> str:
    """The client's own id where it is harmless, else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    text = given[0].decode("latin-1") if len(given) == 1 else ""
    return text if _REQUEST_ID.fullmatch(text) else f"req-{uuid.uuid4().hex}"
