"""Answers as server-sent events: written while they come, given up when nobody reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alpaca_lora.server.connection import while_connected
from alpaca_lora.server.errors import ApiError, internal, too_late
from alpaca_lora.server.json_body import ClientGone

SEND_SECONDS = 30.0  # a reader that takes nothing for so long is gone
DONE = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One event. JSON on one line, so that no text of a model can end it."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends what ``events`` gives, then [DONE]; an error in between is the last event, in OpenAI's shape.

    seconds: until all must have been sent. on_close: called once, whatever happened. on_defect: told of errors that
    are no `ApiError`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], *, seconds: float, on_close: Callable[[], None],
        on_defect: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds = events, seconds
        self._on_close, self._on_defect = on_close, on_defect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = DONE
        try:
            async with asyncio.timeout(self._seconds):
                async for event in self._events:
                    await _send(send, sse(event))
        except TimeoutError:
            last = sse(too_late(self._seconds).to_json())
        except ApiError as error:
            last = sse(error.to_json())
        except ClientGone:
            raise
        except Exception as error:
            self._on_defect(error)
            last = sse(internal().to_json())
        await _send(send, last, more=False)


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    """Waits while the client's buffers are full, but not for ever."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": more})
    except TimeoutError as error:
        raise ClientGone from error
