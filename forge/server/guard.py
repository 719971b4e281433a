"""What every request passes before its endpoint sees it: host, key, and the limits of its body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from contextlib import suppress
from typing import Any

from forge.server import errors
from forge.server.errors import HTTPError
from forge.server.log import LOG
from forge.server.state import Server

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT_CLOSED = 499
"""Status of a request whose client has left, as nginx has it. Nobody reads it."""
_OPEN_PATHS = ("/", "/health")
"""Pages without secrets: the chat page asks for the key itself, and load balancers have none."""
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
"""A string without an end is taken to the end: else each further mark would be tried as the start of one."""
_SUSPECT = re.compile(rb"NaN|Infinity|\\u[dD]")
_DISCARD_SECONDS = 2.0
_SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware."""

    def __init__(self, app: App, server: Server, json_paths: Collection[str]) -> None:
        """json_paths: What takes JSON by POST."""
        self._app, self._settings, self._json_paths = app, server.settings, json_paths
        self._check_ready = server.check_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self._app(scope, receive, send)
            return
        content = b""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and message["status"] != CLIENT_CLOSED:
                    LOG.info("%s %s: status %d", scope["method"][:20], scope["path"][:200], message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *_SECURITY_HEADERS]}
            elif self._settings.log_prompts and content and (answer := message.get("body")):
                LOG.info("%s answers %s", scope["path"], answer.decode(errors="replace"))
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            self._check_key(headers, scope)
            if scope["path"] not in _OPEN_PATHS:
                self._check_ready()
            content, receive = await self._with_body(scope, headers, receive)
        except HTTPError as error:
            await refuse(error, scope, watched)
            return
        if self._settings.log_prompts and content:
            LOG.info("%s is asked %s", scope["path"], content.decode(errors="replace"))
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn leaves out the answer's body
        await self._app({**scope, "method": method}, receive, watched)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site whose name leads to this machine (DNS rebinding) sends that name."""
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = re.sub(r":\d*$", "", name).strip("[]")
        if name not in self._settings.allowed_hosts and not is_address(name):
            raise HTTPError(421, f"the server does not answer for the host {name[:80]!r}", code="wrong_host")

    def _check_key(self, headers: dict[bytes, bytes], scope: Scope) -> None:
        keys = self._settings.api_keys
        if not keys or scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, found = headers.get(b"authorization", b"").partition(b" ")
        given = found.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        matches = [hmac.compare_digest(given, key.encode()) for key in keys]  # all of them: equal time
        if not any(matches):
            raise HTTPError(
                401, "a valid API key is missing", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> tuple[bytes, Receive]:
        """The body, which is checked, and how the application gets it: as one message."""
        limit = self._settings.max_body_bytes
        too_large = HTTPError(413, f"the body may have {limit} bytes", code="request_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            if b"expect" not in headers:  # else the client waits for leave to send
                await _discard(receive)
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        parts.clear()
                        await _discard(receive)
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise HTTPError(408, "the body did not arrive in time", code="timeout") from None
        content = b"".join(parts)
        if scope["method"] == "POST" and scope["path"] in self._json_paths:
            await self._check_json(content, headers)
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if not is_given:
                is_given = True
                return {"type": "http.request", "body": content, "more_body": False}
            return await receive()

        return content, replay

    async def _check_json(self, content: bytes, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # a form of another site's page can send text/plain without being asked
            raise HTTPError(415, "the Content-Type must be application/json", code="unsupported_media_type")
        most = self._settings.max_json_depth
        if len(content) > 1 << 16:
            await asyncio.to_thread(check_json, content, most)
        else:
            check_json(content, most)


def is_address(name: str) -> bool:
    """Whether a host is written as an IP address, which no other site can have as its name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _discard(receive: Receive) -> None:
    """Take what a client sends for a while: it reads no answer before it has sent its body."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


def check_json(content: bytes, most: int) -> None:
    """Raises HTTPError for what Python's reader of JSON takes and JSON does not have, and for what nests too deep.

    That is UTF-16 and UTF-32, whose brackets and quotes are no such bytes, a byte order mark, NaN, Infinity, and halves
    of surrogate pairs. What is no JSON at all is left to the endpoint.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise HTTPError(400, "the body is not JSON in UTF-8", code="invalid_json")
    if text.startswith("\ufeff"):
        raise HTTPError(400, "the body may not begin with a byte order mark", code="invalid_json")
    if json_depth(content, most) > most:
        raise HTTPError(400, f"the body may nest {most} levels deep", code="too_deep")
    if not _SUSPECT.search(content):
        return
    with suppress(ValueError):
        if found := _wrong_value(json.loads(text), ""):
            place, what = found
            raise HTTPError(400, f"{place or 'the body'}: {what}", place or None, "invalid_json")


def _wrong_value(value: Any, place: str) -> tuple[str, str] | None:
    if isinstance(value, float) and not math.isfinite(value):
        return place, "JSON has no numbers that are not finite"
    if isinstance(value, str) and not is_text(value):
        return place, "the text holds half of a surrogate pair"
    if isinstance(value, dict):
        if not all(map(is_text, value)):
            return place, "a field's name holds half of a surrogate pair"
        entries: Iterable[tuple[Any, Any]] = value.items()
    else:
        entries = enumerate(value) if isinstance(value, list) else ()
    found = (_wrong_value(entry, f"{place}.{step}" if place else str(step)) for step, entry in entries)
    return next((one for one in found if one), None)


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_depth(content: bytes, most: int) -> int:
    """How deep JSON nests. It stops counting beyond `most`."""
    depth = deepest = 0
    for match in _NESTING.finditer(content):
        first = content[match.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > deepest:
            deepest = depth
            if deepest > most:
                break
    return deepest


async def refuse(error: HTTPError, scope: Scope, send: Send) -> None:
    """Answer with an error."""
    content = json.dumps(errors.body(error, scope["path"])).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
    if error.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
