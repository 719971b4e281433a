"""The engine's process: loads a model, and serves the requests that come over a socket.

Started by `EngineClient` as ``python -m forge.server.engine_process FD``. The first message is what `forge.load` takes.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from forge.config import Pooling, SamplingParams
from forge.errors import ForgeError
from forge.llm import LLM
from forge.outputs import Chunk
from forge.runtime.request import Request
from forge.runtime.scoring import embedding
from forge.server.heap import use_one_arena

PARENT_IS_GONE = 1


class Outlet:
    """The waiter of a request, or of a pass, whose caller is in the other process."""

    def __init__(self, number: int, post: Callable[[tuple[str, int, Any]], None]) -> None:
        self._number, self._post = number, post
        self.request: Request | None = None
        """None = a pass, of which one result comes."""

    def deliver(self, message: Any) -> None:
        """Called by the engine's thread: an error, chunks, or None when a request without chunks has ended."""
        if isinstance(message, BaseException):
            self._post(("error", self._number, portable(message)))
        elif message is None:
            assert self.request
            self._post(("completions", self._number, self.request.completions()))
        elif self.request is None:
            self._post(("embedding", self._number, message.tobytes()))
        else:
            self._post(("chunks", self._number, [pack(chunk) for chunk in message]))


def pack(chunk: Chunk) -> tuple[Any, ...]:
    """A chunk as a tuple, which is pickled five times as fast."""
    return chunk.text, chunk.ids, chunk.index, chunk.logprobs, chunk.finish_reason, chunk.timings, chunk.stop_string


def portable(error: BaseException) -> ForgeError:
    """An error that the other process can read: a library's error may need modules that it has not imported."""
    return error if isinstance(error, ForgeError) else ForgeError(f"{type(error).__name__}: {error}")


class EngineServer:
    """Answers the messages of one `EngineClient`."""

    def __init__(self, llm: LLM, connection: Connection) -> None:
        self._llm, self._connection = llm, connection
        self._outlets: dict[int, Outlet] = {}
        """The loop holds waiters weakly: a request ends with its entry."""
        self._outbox: SimpleQueue[tuple[str, int, Any] | None] = SimpleQueue()

    def run(self) -> None:
        """Serve until the client is gone or asks to stop."""
        writer = Thread(target=self._write, name="forge engine replies", daemon=True)
        writer.start()
        self._outbox.put(("ready", 0, self._describe()))
        try:
            while True:
                message = pickle.loads(self._connection.recv_bytes())
                if message[0] == "stop":
                    break
                self._handle(*message)
        except (EOFError, OSError):
            os._exit(PARENT_IS_GONE)
        self._llm.close()  # every open request gets its last chunk
        self._outbox.put(None)
        writer.join()

    def _handle(self, kind: str, number: int, content: Any) -> None:
        try:
            if kind == "submit":
                self._submit(number, *content)
            elif kind == "embed":
                self._embed(number, *content)
            elif kind == "stats":
                self._outbox.put(("stats", number, self._llm.engine.stats()))
            elif kind == "cancel":
                outlet = self._outlets.pop(number, None)  # a pass ends with it
                if outlet and outlet.request:
                    self._llm._loop.cancel(outlet.request)
            else:
                raise AssertionError(kind)
        except Exception as error:
            self._outlets.pop(number, None)
            self._outbox.put(("error", number, portable(error)))

    def _submit(
        self, number: int, prompts: list[list[int]], params: SamplingParams, adapter: str | None, is_streamed: bool
    ) -> None:
        llm = self._llm
        outlet = Outlet(number, self._outbox.put)
        request = outlet.request = llm._request(prompts, params, outlet, adapter, is_streamed=is_streamed)
        self._outlets[number] = outlet
        if is_streamed:
            self._outbox.put(("chunks", number, []))  # it is accepted
        llm._loop.submit(request)

    def _embed(self, number: int, ids: list[int], pooling: Pooling, adapter: str | None) -> None:
        llm = self._llm
        llm.engine.check_ids(ids)
        outlet = self._outlets[number] = Outlet(number, self._outbox.put)
        slot = llm._slot_of(adapter)
        llm._loop.submit_pass(embedding(llm.engine, ids, pooling, slot, normalize=True, name=str(llm.path)), outlet)

    def _describe(self) -> dict[str, Any]:
        llm = self._llm
        return {
            "context": llm.context,
            "max_sequences": llm.engine.runner.max_sequences,
            "device": llm.device,
            "notes": llm.notes,
            "load_ms": llm.load_ms,
        }

    def _write(self) -> None:
        """Send replies, all that there are in one message."""
        is_open = True
        while is_open:
            replies = [self._outbox.get()]
            while not self._outbox.empty():
                replies.append(self._outbox.get())
            if replies[-1] is None:
                is_open = False
                replies.pop()
            try:
                self._connection.send_bytes(pickle.dumps(replies, pickle.HIGHEST_PROTOCOL))
            except OSError:
                os._exit(PARENT_IS_GONE)


def end_with_parent(fd: int) -> None:
    """End this process when the other end of a socket is closed, also while a model is loading."""
    watch = select.poll()
    watch.register(fd, select.POLLRDHUP)
    watch.poll()
    os._exit(PARENT_IS_GONE)


def main() -> None:
    """Run as the child of an `EngineClient`."""
    use_one_arena()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to all: the parent says what is to end
    connection = Connection(int(sys.argv[1]))
    Thread(target=end_with_parent, args=(connection.fileno(),), name="forge parent watch", daemon=True).start()
    model, options = pickle.loads(connection.recv_bytes())
    try:
        from forge.loading import load

        llm = load(model, **options)
    except Exception as error:
        connection.send_bytes(pickle.dumps([("failed", 0, portable(error))]))
        sys.exit(1)
    EngineServer(llm, connection).run()


if __name__ == "__main__":
    main()
