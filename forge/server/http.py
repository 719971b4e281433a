"""The socket, the protocol with its timeouts, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import math
import select
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from forge.errors import ForgeError
from forge.server import errors
from forge.server.app import create_app
from forge.server.errors import HTTPError
from forge.server.heap import trim
from forge.server.log import LOG
from forge.server.state import Server

_BACKLOG = 1024
_LOOK_SECONDS = 0.5


def bind(host: str, port: int, send_seconds: float) -> socket.socket:
    """A socket that listens at an address. Raises ForgeError where the address cannot be had.

    send_seconds: A connection whose client takes nothing of what was sent for so long is closed by the kernel.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        unread_ms = math.ceil(1000 * send_seconds)  # connections inherit it
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)
        found.bind(address)
        found.listen(_BACKLOG)  # of two servers that start together the second one fails here
    except OSError as error:
        raise ForgeError(f"{host}:{port}: {error.strerror or error}", parameter="port") from None
    return found


def protocol(header_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes connections that do not send a header in time."""

    class Protocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _look_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_header()
            self._look_timer = self.loop.call_later(_LOOK_SECONDS, self._look)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect_header()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_header()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_timer()
            if self._look_timer:
                self._look_timer.cancel()

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP, or a header that is too long."""
            content = json.dumps(errors.body(HTTPError(400, "this is no valid HTTP request", code="invalid_http"), "/"))
            headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
            head = h11.Response(status_code=400, headers=[*headers, ("connection", "close")])
            for event in (head, h11.Data(data=content.encode()), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def _look(self) -> None:
            """While reading is paused, as behind a pipelined request, the event loop sees no client leave."""
            if self.flow.read_paused and is_hung_up(self.transport.get_extra_info("socket")):
                self.transport.abort()
            else:
                self._look_timer = self.loop.call_later(_LOOK_SECONDS, self._look)

        def _expect_header(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(header_seconds, self.timeout_keep_alive_handler)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return Protocol


def is_hung_up(connection: Any) -> bool:
    """Whether the other end of a connection has closed it, though it may have sent things that are not read yet."""
    look = select.poll()
    look.register(connection.fileno(), select.POLLRDHUP)
    return bool(look.poll(0))


_TRIM_TICKS = 150
"""Ticks of uvicorn's, of which there are ten in a second, between two times that free memory is given back."""


class HTTPServer(uvicorn.Server):
    """uvicorn's server. When it is to stop, answers may go on for a while; then each open stream gets its end."""

    def __init__(self, server: Server) -> None:
        settings = server.settings
        super().__init__(
            uvicorn.Config(
                create_app(server),
                http=protocol(settings.header_seconds),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # call_later takes fractions
                timeout_graceful_shutdown=int(settings.shutdown_seconds) + 1,
            )
        )
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at the first signal; at a second one without waiting. uvicorn would end the process by the signal."""
        self.should_exit, self.force_exit = True, self.should_exit
        if self.force_exit:
            self._server.client.kill()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the model, begin to listen, and say where when the model is ready."""
        await self._server.client.start()
        await super().startup(sockets)
        self._announcement = asyncio.create_task(self._announce((sockets or [])[0]))

    async def on_tick(self, counter: int) -> bool:
        """Whether the server is to end: without its engine it is of no use."""
        if counter % _TRIM_TICKS == 0:
            trim()
        return await super().on_tick(counter) or self._server.client.state == "failed"

    async def _announce(self, listener: socket.socket) -> None:
        client, settings = self._server.client, self._server.settings
        await client.changed.wait()
        if client.state != "ready":
            return
        for note in client.info["notes"]:
            LOG.info("%s", note)
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
        LOG.info(
            "serving %s on %s, context %s, loaded in %.1f s, at %s (chat page) and %s/v1 (API); for example:",
            *(settings.model_name, client.info["device"], client.info["context"], client.info["load_ms"] / 1000),
            *(address, address),
        )
        body = """{"messages": [{"role": "user", "content": "Say hi"}]}"""
        LOG.info("curl %s/v1/chat/completions%s -H 'Content-Type: application/json' -d '%s'", address, key, body)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let answers go on for a while, and end what is left, with an engine that hangs as well."""
        seconds, client, loop = self._server.settings.shutdown_seconds, self._server.client, asyncio.get_running_loop()
        end = loop.time() + seconds
        timers = loop.call_at(end - min(2.0, seconds / 2), client.stop), loop.call_at(end, client.kill)
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()
        self._announcement.cancel()
        if not self.force_exit:
            await client.close(max(1.0, end - loop.time()))
