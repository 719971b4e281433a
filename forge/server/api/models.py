"""/v1/models"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from forge.server.api.common import server_of
from forge.server.errors import HTTPError
from forge.server.state import Server

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model."""
    return {"object": "list", "data": [_model(server_of(request))]}


@router.get("/v1/models/{id:path}")
async def model(request: Request, id: str) -> dict[str, Any]:
    """The model of this name."""
    found = _model(server_of(request))
    if id != found["id"]:
        raise HTTPError(404, f"the server has no model {id!r:.100}", "model", "model_not_found")
    return found


def _model(server: Server) -> dict[str, Any]:
    """Its most tokens a sequence have two names in use. They are known when the model is loaded."""
    model = {"id": server.settings.model_name, "object": "model", "created": server.created, "owned_by": "forge"}
    context = server.client.info.get("context")
    return model | ({"context_length": context, "max_model_len": context} if context else {})
