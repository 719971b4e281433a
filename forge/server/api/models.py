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
    """The model, and its adapters."""
    return {"object": "list", "data": _models(server_of(request))}


@router.get("/v1/models/{id:path}")
async def model(request: Request, id: str) -> dict[str, Any]:
    """The model of this name."""
    for found in _models(server_of(request)):
        if id == found["id"]:
            return found
    raise HTTPError(404, f"the server has no model {id!r:.100}", "model", "model_not_found")


def _models(server: Server) -> list[dict[str, Any]]:
    """Their most tokens a sequence have two names in use. They are known when the model is loaded. An adapter's parent
    is the model, as vLLM has it."""
    context, name = server.client.info.get("context"), server.settings.model_name
    common = {"object": "model", "created": server.created, "owned_by": "forge"}
    common |= {"context_length": context, "max_model_len": context} if context else {}
    adapters = [{"id": adapter, **common, "parent": name} for adapter in server.settings.adapters]
    return [{"id": name, **common}, *adapters]
