"""GET /health, /ready and /metrics: for those who watch the process."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.server.service import Service


class StatusApi:
    """The routes. None of them waits for the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """200 as long as the engine's thread lives; 503 means that only a new process will help."""
        if self._service.bridge.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 when requests are taken: not before all is loaded, not while the server drains."""
        state = "failed" if self._service.bridge.failure is not None else self._service.lifecycle.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self._service.metrics.expose(), media_type=CONTENT_TYPE_LATEST)
