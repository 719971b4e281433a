"""The engine's process as seen from the server's: requests are sent, and what they bring arrives as events."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

from forge.config import Pooling, SamplingParams
from forge.engine import EngineStats
from forge.errors import ForgeError, ParameterError
from forge.outputs import Chunk, Completion
from forge.server.errors import HTTPError

_LENGTH = struct.Struct("!i")
"""The header of a message, as multiprocessing.connection writes it: its bytes, or -1 before a longer number."""
_LONG_LENGTH = struct.Struct("!Q")
_MAX_SHORT = 0x7FFFFFFF
_END_SECONDS = 5.0
"""Longest wait for a process that is to be gone. One that waits for a driver that hangs cannot be killed."""


class EngineClient:
    """Starts the engine's process and speaks to it. Use it in one event loop."""

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        """options: Keywords of `forge.load`."""
        self._model, self._options = model, options
        self._numbers = count(1)
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.state: Literal["loading", "ready", "stopping", "failed"] = "loading"
        self.error: Exception | None = None
        """Why the engine's process is of no use."""
        self.info: dict[str, Any] = {}
        """What the engine says of itself when it is ready."""
        self.changed = asyncio.Event()
        """Set when the engine is ready, and when it has failed."""

    async def start(self) -> None:
        """Start the process. It loads the model meanwhile: `changed` says when it is ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "forge.server.engine_process", str(theirs.fileno())]
            # in a group of its own: a terminal's Ctrl-C is for this process
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._send((self._model, self._options))
        self._reading = asyncio.create_task(self._read(reader))

    async def stream(
        self, prompts: list[list[int]], params: SamplingParams, adapter: str | None
    ) -> AsyncGenerator[list[Chunk], None]:
        """Chunks as they come, all that have come since the last ones together. Closing it ends the request.

        The first list is empty: the engine has accepted the request.
        """
        running = len(prompts) * params.n
        number, queue = self._submit_request(prompts, params, adapter, is_streamed=True)
        try:
            while running:
                chunks = [Chunk(*found) for found in await _get(queue)]
                while chunks and not queue.empty():
                    chunks += [Chunk(*found) for found in await _get(queue)]
                running -= sum(chunk.finish_reason is not None for chunk in chunks)
                yield chunks
        finally:
            self._forget(number)

    async def complete(self, prompts: list[list[int]], params: SamplingParams, adapter: str | None) -> list[Completion]:
        """All completions at once, the n choices of the first prompt first. Cancelling the task ends the request."""
        number, queue = self._submit_request(prompts, params, adapter, is_streamed=False)
        try:
            completions: list[Completion] = await _get(queue)
            return completions
        finally:
            self._forget(number)

    async def embed(self, ids: list[int], pooling: Pooling, adapter: str | None) -> bytes:
        """The embedding of a prompt, of length 1: float32 (E,) in the machine's byte order."""
        number, queue = self._submit("embed", (ids, pooling, adapter))
        try:
            embedding: bytes = await _get(queue)
            return embedding
        finally:
            self._forget(number)

    async def stats(self) -> EngineStats:
        """What the engine is doing."""
        number, queue = self._submit("stats", None)
        try:
            stats: EngineStats = await _get(queue)
            return stats
        finally:
            self._queues.pop(number, None)

    def stop(self) -> None:
        """End all requests as aborted, each with its last chunk, and the process."""
        if self.state == "ready":
            self.state = "stopping"
            self._send(("stop", 0, None))
        elif self.state == "loading":  # it would answer when the model is loaded
            self.kill()

    async def close(self, seconds: float) -> None:
        """Stop, and wait for the process to end for so long at most; then kill it."""
        self.stop()
        assert self._process
        assert self._reading
        assert self._writer
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, seconds)
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _END_SECONDS)
            await self._reading  # what it has sent
        self._writer.transport.abort()
        await self._reading

    def kill(self) -> None:
        """End the process, without waiting for its end."""
        if self.state != "failed":
            self.state = "stopping"
        if self._process:
            self._process.kill()

    def _submit(self, kind: str, content: Any) -> tuple[int, asyncio.Queue[Any]]:
        if self.state != "ready":
            raise self.error or ForgeError("the engine is not ready")
        number = next(self._numbers)
        queue = self._queues[number] = asyncio.Queue()
        self._send((kind, number, content))
        return number, queue

    def _submit_request(
        self, prompts: list[list[int]], params: SamplingParams, adapter: str | None, *, is_streamed: bool
    ) -> tuple[int, asyncio.Queue[Any]]:
        for name in ("logits_processors", "sampler"):
            if getattr(params, name) not in ((), None):
                message = f"{name}: Python functions stay in this process, and the engine runs in another one"
                raise ParameterError(message, parameter=name, hint="use them with an LLM of forge.load")
        return self._submit("submit", (prompts, params, adapter, is_streamed))

    def _forget(self, number: int) -> None:
        if self._queues.pop(number, None) is not None and self.state == "ready":
            self._send(("cancel", number, None))

    def _send(self, message: Any) -> None:
        assert self._writer
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        if len(content) > _MAX_SHORT:
            raise ForgeError(f"a message of {len(content)} bytes is too long for the engine")
        self._writer.write(_LENGTH.pack(len(content)) + content)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length < 0:
                    (length,) = _LONG_LENGTH.unpack(await reader.readexactly(_LONG_LENGTH.size))
                for kind, number, content in pickle.loads(await reader.readexactly(length)):
                    self._receive(kind, number, content)
        except (asyncio.IncompleteReadError, ConnectionError):
            cause = "" if self.state == "stopping" else await self._cause()
            self._end(self.error or ForgeError(f"the engine's process has ended{cause}"))

    async def _cause(self) -> str:
        """Why the process has ended, as far as one can tell."""
        assert self._process
        with suppress(subprocess.TimeoutExpired):
            code = await asyncio.to_thread(self._process.wait, _END_SECONDS)
            if code < 0:
                name = signal.Signals(-code).name
                return f" by {name}" + (": perhaps memory ran out" if code == -signal.SIGKILL else "")
            return f" with code {code}"
        return ""

    def _receive(self, kind: str, number: int, content: Any) -> None:
        if kind == "ready":
            self.state, self.info = "ready", content
            self.changed.set()
        elif kind == "failed":
            self.error = content
        elif queue := self._queues.get(number):  # else it was cancelled
            queue.put_nowait(content)

    def _end(self, error: Exception) -> None:
        if self.state == "stopping":
            error = HTTPError(503, "the server is shutting down", code="shutting_down")
        else:
            self.state = "failed"
        self.error = error
        self.changed.set()
        for queue in self._queues.values():
            queue.put_nowait(error)


async def _get(queue: asyncio.Queue[Any]) -> Any:
    """The next content; raises it where it is an error."""
    content = await queue.get()
    if isinstance(content, Exception):
        raise content
    return content
