"""HTTP as bytes on a socket, for what no client library would send."""

from __future__ import annotations

import json
import socket
from typing import Any

from served import Served


def connect(served: Served, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection to a server. The caller closes it."""
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    found = socket.socket()
    if receive_buffer:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(60)
    try:
        found.connect((host, int(port)))
    except OSError:
        found.close()
        raise
    return found


def request(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """A request. body: bytes, or what is sent as JSON."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + content


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def read_response(connection: socket.socket) -> tuple[int, bytes]:
    """Status and content of one response that has a Content-Length."""
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(1)
        assert part, head
        head += part
    lines = head.decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    content = b""
    while len(content) < length:
        part = connection.recv(length - len(content))
        assert part, content
        content += part
    return int(lines[0].split()[1]), content


def exchange(served: Served, sent: bytes) -> tuple[int, Any]:
    """Send bytes on a connection of their own; status and JSON of the first answer."""
    with connect(served) as connection:
        connection.sendall(sent)
        status, content = read_response(connection)
        return status, json.loads(content) if content else None
