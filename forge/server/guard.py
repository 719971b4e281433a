"""What every request passes before its endpoint sees it: host, key, and the limits of its body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from forge.server import errors
from forge.server.errors import HTTPError
from forge.server.settings import ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/", "/health")
"""Pages without secrets: the chat page asks for the key itself, and load balancers have none."""
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            self._check_key(headers, scope)
            receive = await self._with_body(scope, headers, receive)
        except HTTPError as error:
            await refuse(error, scope, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_SECURITY_HEADERS]}
            await send(message)

        await self._app(scope, receive, secured)

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

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the body, check it, and give it to the application as one message."""
        limit = self._settings.max_body_bytes
        too_large = HTTPError(413, f"the body may have {limit} bytes", code="request_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limit:
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
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise HTTPError(408, "the body did not arrive in time", code="timeout") from None
        content = b"".join(parts)
        if scope["method"] == "POST":
            await self._check_json(content, headers)
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if not is_given:
                is_given = True
                return {"type": "http.request", "body": content, "more_body": False}
            return await receive()

        return replay

    async def _check_json(self, content: bytes, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # a form of another site's page can send text/plain without being asked
            raise HTTPError(415, "the Content-Type must be application/json", code="unsupported_media_type")
        most = self._settings.max_json_depth
        large = len(content) > 1 << 16
        depth = await asyncio.to_thread(json_depth, content, most) if large else json_depth(content, most)
        if depth > most:
            raise HTTPError(400, f"the body may nest {most} levels deep", code="too_deep")


def is_address(name: str) -> bool:
    """Whether a host is written as an IP address, which no other site can have as its name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
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
    await send({"type": "http.response.start", "status": error.status, "headers": headers + _SECURITY_HEADERS})
    await send({"type": "http.response.body", "body": content})
