"""The OpenAPI description of bodies that are read strictly by ourselves: the models' own JSON schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from alpaca_lora.server.protocol import Body

REF = "#/components/schemas/{model}"


def takes(model: type[Body]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route with this body."""
    schema = {"$ref": REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


NAMED: Mapping[str, Any] = {
    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
}


def describe(app: FastAPI, models: Sequence[type[Body]], *, has_keys: bool) -> None:
    """Let the application describe itself with these bodies among its components."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema([(model, "validation") for model in models], ref_template=REF)
            components = described.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **bodies.get("$defs", {})}
            if has_keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                described["security"] = [{"key": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
