"""The application: every route with its handler, what stands around them, and when the engine's thread begins and ends.

Takes the engine, the bank, the policy as arguments: nothing here loads a model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from alpaca_lora import __version__
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.server.adapters_api import AdapterRequest, AdaptersApi
from alpaca_lora.server.bridge import Bridge, Engine
from alpaca_lora.server.chat_api import ChatApi
from alpaca_lora.server.classify_api import Classifier, ClassifyApi
from alpaca_lora.server.completions_api import CompletionsApi
from alpaca_lora.server.errors import ApiError
from alpaca_lora.server.frame import Frame, error_response
from alpaca_lora.server.gate import Gate
from alpaca_lora.server.keys import KeyRing
from alpaca_lora.server.lifecycle import Lifecycle
from alpaca_lora.server.limits import KeyLimits
from alpaca_lora.server.metrics import Metrics
from alpaca_lora.server.models_api import ModelsApi
from alpaca_lora.server.moderations_api import ModerationsApi
from alpaca_lora.server.openapi import NAMED, describe, takes
from alpaca_lora.server.options import ServeOptions
from alpaca_lora.server.protocol import ChatRequest, ClassifyRequest, CompletionRequest, ModerationRequest
from alpaca_lora.server.rails import PolicyOf
from alpaca_lora.server.request_log import RequestLog
from alpaca_lora.server.served_models import Bank, ServedModels
from alpaca_lora.server.service import Grammars, Service
from alpaca_lora.server.static_files import StaticFiles
from alpaca_lora.server.status_api import StatusApi
from alpaca_lora.server.workers import Workers

OPEN_PATHS = ("/health", "/ready")
STOP_SECONDS = 10.0  # a step that takes longer does not hold the process


def create_app(
    engine: Engine, bank: Bank, prompts: PromptFormat, options: ServeOptions, *, base_name: str, fingerprint: str,
    grammars: Grammars, policy_of: PolicyOf = lambda adapter: None, keys: KeyRing | None = None,
    pages: StaticFiles | None = None,
) -> FastAPI:  # fmt: skip
    """The service as an ASGI application; ``app.state.service`` is what its routes share.

    prompts: the base's own format; fingerprint: the base's; policy_of: the rails of an adapter (None: of the base).
    """
    log, keys, pages = RequestLog(), keys or KeyRing(), pages or StaticFiles()
    bridge = Bridge(engine, on_failure=lambda error: log.defect(error, thread="engine"))
    service = Service(
        options, bridge, ServedModels(base_name, fingerprint, prompts, bank), Workers(), Workers(), Workers(2),
        grammars, policy_of,
        KeyLimits(requests_per_minute=options.requests_per_minute, max_concurrency=options.max_concurrency),
        Metrics(base_name, lambda: bridge.stats), Lifecycle(), log,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        bridge.start()
        service.lifecycle.state = "ready"
        yield
        await bridge.stop(STOP_SECONDS)
        for workers in (service.workers, service.rail_workers, service.loaders):
            workers.close()

    app = FastAPI(
        title="alpaca-lora", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    _add_routes(app, service)
    for path in pages.paths:
        app.add_route(path, pages.serve, methods=["GET"], include_in_schema=False)
    _add_errors(app, service)
    # the last one stands outermost
    app.add_middleware(Gate, ring=keys, open_paths=(*OPEN_PATHS, *pages.paths), on_error=service.metrics.error)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"], expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(Frame, log=log)
    described = (ChatRequest, CompletionRequest, ClassifyRequest, ModerationRequest, AdapterRequest)
    describe(app, described, has_keys=bool(keys))
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    status, models, adapters = StatusApi(service), ModelsApi(service), AdaptersApi(service)
    classify = ClassifyApi(service, Classifier(service))
    for path, handler in (
        ("/health", status.health), ("/ready", status.ready), ("/metrics", status.metrics),
        ("/v1/models", models.list), ("/v1/models/{name:path}", models.get), ("/v1/adapters", adapters.list),
        ("/v1/adapters/{name}/report", adapters.report),
    ):  # fmt: skip
        extra = dict(NAMED) if "{name" in path else None
        app.add_api_route(path, handler, methods=["GET"], response_model=None, openapi_extra=extra)
    for path, handler, body in (
        ("/v1/chat/completions", ChatApi(service).create, ChatRequest),
        ("/v1/completions", CompletionsApi(service).create, CompletionRequest),
        ("/v1/classify", classify.create, ClassifyRequest),
        ("/v1/moderations", ModerationsApi(service).create, ModerationRequest),
        ("/v1/adapters", adapters.load, AdapterRequest),
    ):
        app.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra=takes(body))
    app.add_api_route(
        "/v1/adapters/{name}", adapters.unload, methods=["DELETE"], response_model=None, openapi_extra=dict(NAMED)
    )


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error in one shape, also those of paths and methods that do not exist."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        service.metrics.error(error)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        what = {404: "There is nothing at this path", 405: "This path does not take this method"}
        told = ApiError(error.status_code, what.get(error.status_code, str(error.detail)), code=code)
        service.metrics.error(told)
        response = error_response(told)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
