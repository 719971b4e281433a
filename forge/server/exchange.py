"""One request's exchange with its client: the work goes on while the client is there, and ends with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forge.server import errors
from forge.server.errors import HTTPError
from forge.server.guard import CLIENT_CLOSED, Receive, Scope, Send, refuse
from forge.server.log import LOG

T = TypeVar("T")


class ClientGone(Exception):
    """The client has left: nobody reads the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone then."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The JSON that `work` returns, as a response."""
    try:
        return JSONResponse(await while_connected(request.receive, work))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)


Event = tuple[str | None, dict[str, Any] | str]
"""Name of a server-sent event, or None, and its data: JSON or a word."""


class Answer(Protocol):
    """What an endpoint makes of a request, whole or piece by piece."""

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""

    def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""


async def respond(
    request: Request, made: Answer, on_error: Callable[[HTTPError], list[Event]], *, is_streamed: bool
) -> Response:
    """The response to a request: events, or one object."""
    return EventStream(made.events(), on_error) if is_streamed else await answer(request, made.complete())


class EventStream(Response):
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) from a generator.

    The answer begins with the first event: an error before it has a status of its own. An error behind it is an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[list[Event], None],
        on_error: Callable[[HTTPError], list[Event]],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_error = events, on_error
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or as many as the client wants."""
        with suppress(ClientGone):
            await while_connected(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async for events in self._events:
                    await self._send(send, events)
            except Exception as error:
                found = errors.from_error(error)
                if found.code == "internal_error":
                    LOG.error("%s", error, exc_info=True)
                if not self._has_begun:
                    await refuse(found, scope, send)
                    return
                await self._send(send, self._on_error(found))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, events: list[Event]) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if events:
            await send({"type": "http.response.body", "body": b"".join(map(_encoded, events)), "more_body": True})


def _encoded(event: Event) -> bytes:
    name, data = event
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode() if name else f"data: {text}\n\n".encode()
