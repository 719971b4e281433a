"""The application: all endpoints behind the guard."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

import forge
from forge.server import errors
from forge.server.api import chat_completions, completions
from forge.server.errors import HTTPError
from forge.server.guard import Guard
from forge.server.state import Server


def create_app(server: Server) -> FastAPI:
    """The ASGI application of a server. It starts the engine's process, and ends it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await server.client.start()
        try:
            yield
        finally:
            await server.client.close(server.settings.shutdown_seconds)

    app = FastAPI(
        title="forge",
        version=forge.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    for router in (chat_completions.router, completions.router):
        app.include_router(router)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Status 200 when the model is loaded and warm; 503 before that, and when the server is to stop."""
        state = server.client.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(server)]}

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(request, _from_validation(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path[:200]}"
        return _refusal(request, HTTPError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(HTTPError)
    @app.exception_handler(forge.ForgeError)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _refusal(request, errors.from_error(error))

    app.add_middleware(Guard, settings=server.settings)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.settings.model_name, "object": "model", "created": server.created, "owned_by": "forge"}


def _refusal(request: Request, error: HTTPError) -> JSONResponse:
    return JSONResponse(errors.body(error, request.url.path), error.status, error.headers)


def _from_validation(error: RequestValidationError) -> HTTPError:
    """The first thing that is wrong with a body, with the place where it is."""
    first = error.errors()[0]
    place = ".".join(str(step) for step in first["loc"][1:])
    if first["type"] == "json_invalid":
        return HTTPError(400, "the body is not JSON", code="invalid_json")
    message = str(first["msg"])
    if first["type"] == "extra_forbidden":
        message = "the server does not know this field"
    return HTTPError(400, f"{place}: {message}" if place else message, place or None, "invalid_value")
