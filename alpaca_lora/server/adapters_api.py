"""/v1/adapters: what is loaded, an adapter's training report, and, with the admin key, loading and unloading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.errors import AdapterError, AlpacaLoraError, NumericalError
from alpaca_lora.server.errors import ApiError, forbidden, invalid, of_error
from alpaca_lora.server.protocol import Body
from alpaca_lora.server.served_models import LoadedAdapter
from alpaca_lora.server.service import Service

METRICS_NAME = "metrics.jsonl"
MAX_METRICS_BYTES = 64 << 20
MAX_ROWS = 2000  # of a report; longer logs are thinned evenly, their last row stays


class AdapterRequest(Body):
    """The body of POST /v1/adapters. ``path``: folder below the server's adapter_dir; without it that of the name."""

    name: str = Field(min_length=1, max_length=64)
    path: str | None = Field(None, min_length=1, max_length=512)
    pinned: bool = False


class AdaptersApi:
    """The routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, request: Request) -> Response:
        """All adapters, by name."""
        bank = self._service.models.bank
        found = [self._json(bank.get(name)) for name in sorted(bank.names())]
        return JSONResponse({"object": "list", "data": found})

    async def load(self, request: Request) -> Response:
        """Read an adapter folder and serve it under a name; one of that name is replaced when nobody uses it."""
        service = self._service
        folder = self._admin_folder(request)
        turn = service.enter(request)
        try:
            asked = await service.read(request, AdapterRequest)
            loaded = await service.loaders.run(self._load, asked, folder)
            service.log.warning("adapter loaded", key=turn.caller.name, name=loaded.name, digest=loaded.digest)
            return JSONResponse(self._json(loaded), 201)
        finally:
            turn.close()

    async def unload(self, request: Request) -> Response:
        """Forget a name; requests that use the adapter end as they would have."""
        self._admin_folder(request)
        service, name = self._service, request.path_params["name"]
        try:
            await service.loaders.run(service.models.bank.unload, name)
        except AlpacaLoraError as error:
            raise _unknown(name) from error
        service.models.forget(name)
        service.log.warning("adapter unloaded", key=request.state.caller.name, name=name)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    async def report(self, request: Request) -> Response:
        """What its training logged: the rows of metrics.jsonl, and the final figures."""
        name = request.path_params["name"]
        if name not in self._service.models.bank.names():
            raise _unknown(name)
        return JSONResponse(await self._service.workers.run(self._report, name))

    def _admin_folder(self, request: Request) -> str:
        """Where adapters may come from. ApiError 403 for other callers than the admin, or when loading is off."""
        if not request.state.caller.is_admin:
            raise forbidden("Adapters are loaded and unloaded with the admin key")
        if self._service.options.adapter_dir is None:
            raise forbidden("This server has no adapter_dir to load adapters from")
        return self._service.options.adapter_dir

    def _load(self, asked: AdapterRequest, adapter_dir: str) -> LoadedAdapter:
        models = self._service.models
        if asked.name == models.base_name:
            raise invalid("The name is that of the base model", "name")
        folder = _inside(Path(adapter_dir), asked.path or asked.name)
        try:
            loaded = models.bank.load(asked.name, folder, pinned=asked.pinned)
        except NumericalError as error:  # of the folder's weights: nothing of ours was computed with them
            told = AdapterError(error.what, field=error.field, expected=error.expected, fix=error.fix)
            raise of_error(told, param="path") from error
        except AlpacaLoraError as error:
            raise of_error(error, param="name" if error.field == "name" else "path") from error
        try:
            models.of_adapter(loaded)
        except AlpacaLoraError as error:
            models.bank.unload(asked.name)
            raise of_error(error, param="path") from error
        return loaded

    def _report(self, name: str) -> dict[str, Any]:
        loaded = self._service.models.bank.get(name)
        summary = dict(loaded.record.metrics) if loaded.record is not None else {}
        rows = _rows(loaded.folder / METRICS_NAME)
        if not rows and not summary:
            raise ApiError(404, f"The adapter {name!r} has no training report", param="name", code="no_report")
        return {"object": "adapter.report", "id": name, "metrics": rows, "summary": _finite(summary)}

    @staticmethod
    def _json(loaded: LoadedAdapter) -> dict[str, Any]:
        record = loaded.record
        template = record.template.get("name") if record is not None else None
        return {
            "id": loaded.name, "object": "adapter", "method": loaded.method, "digest": loaded.digest,
            "num_bytes": loaded.num_bytes, "is_resident": loaded.is_resident, "labels": list(loaded.labels),
            "num_virtual_tokens": loaded.num_virtual, "template": template,
        }  # fmt: skip


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"No adapter {name[:80]!r} is loaded", param="name", code="adapter_not_found")


def _inside(root: Path, path: str) -> Path:
    """The folder below ``root``, links followed. ApiError 400 for anything else, and never a word of what is there."""
    wrong = invalid("No adapter folder of this name is below the server's adapter_dir", "path")
    if "\0" in path or "\\" in path or Path(path).is_absolute():
        raise wrong
    try:
        real_root = root.resolve(strict=True)
        folder = (real_root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise wrong from error
    if folder == real_root or not folder.is_relative_to(real_root) or not folder.is_dir():
        raise wrong
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    """The log of a training, thinned; empty where there is none."""
    try:
        if path.stat().st_size > MAX_METRICS_BYTES:
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if line and isinstance(row := json.loads(line), dict)]
    except (OSError, ValueError):
        return []  # no report is better than none of the adapter's other answers
    return [_finite(row) for row in _thinned(rows)]


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about twice `MAX_ROWS`, validations kept before steps; the last row always."""
    kept: set[int] = {len(rows) - 1} if rows else set()
    for is_validation in (True, False):
        places = [place for place, row in enumerate(rows) if ("val_loss" in row) is is_validation]
        kept.update(places[:: math.ceil(len(places) / MAX_ROWS) or 1])
    return [rows[place] for place in sorted(kept)]


def _finite(value: Any) -> Any:
    """With null in the place of numbers that are no JSON."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        items: Iterable[Any] = value
        return [_finite(item) for item in items]
    return None if isinstance(value, float) and not math.isfinite(value) else value
