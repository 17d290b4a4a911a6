"""POST /v1/moderations: what the input rail of a model's policy finds in texts, in OpenAI's shape."""

from __future__ import annotations

import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.server.errors import ApiError
from alpaca_lora.server.protocol import ModerationRequest
from alpaca_lora.server.rails import Rails
from alpaca_lora.server.service import Service


class ModerationsApi:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Whether each text is flagged, and by which categories of the policy."""
        service = self._service
        turn = service.enter(request)
        try:
            asked = await service.read(request, ModerationRequest)
            model = await service.find_model(asked.model or service.models.base_name)
            rails = service.rails_of(model)
            if not rails.are_there:
                raise ApiError(404, "This server has no safety policy", code="no_policy")
            results = [await service.rail_workers.run(_result, rails, text) for text in asked.texts]
            return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": model.name, "results": results})
        finally:
            turn.close()


def _result(rails: Rails, text: str) -> dict[str, Any]:
    """A rule matches or it does not: its category's score is 1 or 0."""
    verdict, categories = rails.moderate(text)
    found = set(verdict.categories)
    names = sorted({*categories, *found})
    return {
        "flagged": bool(found),
        "categories": {name: name in found for name in names},
        "category_scores": {name: float(name in found) for name in names},
        "category_applied_input_types": {name: ["text"] for name in names},
    }
