"""GET /v1/models: the names that the field ``model`` takes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.server.service import Service


class ModelsApi:
    """The routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, request: Request) -> Response:
        """The base model first, then the adapters by name."""
        models = await self._service.workers.run(self._service.models.all)
        return JSONResponse({"object": "list", "data": [self._json(model) for model in models]})

    async def get(self, request: Request) -> Response:
        """One model by its name."""
        model = await self._service.find_model(request.path_params["name"])
        return JSONResponse(self._json(model))

    def _json(self, model: ServedModel) -> dict[str, Any]:
        """OpenAI's fields, and ours: kind, the template, the labels of a classifier."""
        service = self._service
        kind = "base" if model.adapter is None else "adapter" if model.prompts is not None else "classifier"
        found: dict[str, Any] = {
            "id": model.name, "object": "model", "created": model.created, "owned_by": "alpaca-lora", "kind": kind,
            "max_model_len": service.bridge.context_length - model.num_virtual,
        }  # fmt: skip
        if model.prompts is not None:
            found["template"] = model.prompts.template.name
        if model.adapter is not None:
            found |= {"parent": service.models.base_name, "method": model.method, "rank": model.rank}
        if model.labels:
            found["labels"] = list(model.labels)
        return found
