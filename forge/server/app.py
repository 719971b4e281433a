"""The application: all endpoints behind the guard."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

import forge
from forge.server import errors
from forge.server.api import (
    anthropic_messages,
    chat_completions,
    completions,
    embeddings,
    models,
    responses,
    tokens,
)
from forge.server.chat_page import chat_page
from forge.server.errors import HTTPError
from forge.server.guard import Guard
from forge.server.state import Server

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with `stream`, as server-sent events.", "content": {"text/event-stream": {}}}
}


def create_app(server: Server) -> FastAPI:
    """The ASGI application of a server, whose engine others start and end."""
    app = FastAPI(
        title="forge",
        version=forge.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=errors.described() | _STREAM,
    )
    app.state.server = server
    for api in (chat_completions, completions, responses, embeddings, models, anthropic_messages, tokens):
        app.include_router(api.router)

    page = chat_page()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """The chat page."""
        return page

    @app.get("/health")
    async def health() -> JSONResponse:
        """Status 200 when the model is loaded and warm; 503 before that, and when the server is to stop."""
        state = server.client.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(server.metrics.text(await server.client.stats()), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(request, _from_validation(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method[:20]} {request.url.path[:200]}"
        if error.status_code == 400:  # FastAPI's, for JSON that Python reads no further
            message = "the body cannot be read: a number has thousands of digits"
        return _refusal(request, HTTPError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(HTTPError)
    @app.exception_handler(forge.ForgeError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _refusal(request, errors.from_error(error))

    json_paths = {path for path, methods in app.openapi()["paths"].items() if "post" in methods}
    app.add_middleware(Guard, server=server, json_paths=json_paths)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _refusal(request: Request, error: HTTPError) -> JSONResponse:
    return JSONResponse(errors.body(error, request.url.path), error.status, error.headers)


_OF_OTHERS = ("missing", "extra_forbidden")
"""Errors of something that is meant to be another thing: what it has that is wrong says more."""


def _from_validation(error: RequestValidationError) -> HTTPError:
    """What is wrong with a body, and the field: of a union's errors the one that lies deepest, as it fits best."""
    if error.errors()[0]["type"] == "json_invalid":
        return HTTPError(400, "the body is not JSON", code="invalid_json")
    fields = [_field(one["loc"][1:], error.body, is_missing=one["type"] == "missing") for one in error.errors()]
    found = zip(fields, error.errors(), strict=True)
    field, first = max(found, key=lambda one: (len(one[0]), one[1]["type"] not in _OF_OTHERS))
    place = ".".join(field)
    message = str(first["msg"])
    if first["type"] == "extra_forbidden":
        message = "the server does not know this field"
    if first["type"] == "model_attributes_type":
        message = "must be a JSON object"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        message += f", not {first['input']!r:.40}"
    return HTTPError(400, f"{place}: {message}" if place else message, place or None, "invalid_value")


def _field(steps: tuple[str | int, ...], body: Any, *, is_missing: bool) -> list[str]:
    """The steps to a field of a body, without those that name a union's members.

    A member may have the name of a field beside: the block "text" has a text.
    """
    found = []
    for place, step in enumerate(steps):
        has_step = step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int)
        later = steps[place + 1 :]
        if has_step and not (isinstance(body[step], str) and any(name in body for name in later)):
            body = body[step]
        elif not (is_missing and place == len(steps) - 1):
            continue
        found.append(str(step))
    return found
