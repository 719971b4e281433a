"""Log lines of the server, for people: one for each request, without escape sequences that a client sent."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Full, Queue
from threading import Thread

from forge.display import printable

LOG = logging.getLogger("forge.server")
_FOREIGN = ("uvicorn.error", "asyncio")
"""Loggers of libraries, whose warnings are shown."""
_MAX_LINES = 10_000
_FLUSH_SECONDS = 1.0


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        if record.exc_info:
            text += "".join(f"\n{printable(line)}" for line in self.formatException(record.exc_info).splitlines())
        return f"{self.formatTime(record, '%H:%M:%S')} {text}"


class _Background(logging.Handler):
    """Writes lines in a thread of its own, and loses lines where the reader is far too slow.

    A pipe that nobody reads must not hold up the event loop.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd, self._lines = fd, Queue[str | None](_MAX_LINES)
        self._thread = Thread(target=self._write, name="forge log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
            return  # uvicorn reports each request that the server's end cuts
        with suppress(Full):
            self._lines.put_nowait(self.format(record) + "\n")

    def close(self) -> None:
        """Write what is left, as far as the reader takes it within a second."""
        with suppress(Full):
            self._lines.put_nowait(None)
        self._thread.join(_FLUSH_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            rest = line.encode(errors="backslashreplace")
            with suppress(OSError):  # nobody reads any more
                while rest:  # not by sys.stderr: the interpreter's end would wait for its lock
                    rest = rest[os.write(self._fd, rest) :]


@contextmanager
def to_stderr(*, quiet: bool = False) -> Iterator[None]:
    """Write the log to stderr. quiet: warnings and errors alone."""
    handler = _Background(sys.stderr.fileno())
    handler.setFormatter(_Formatter())
    loggers = [LOG, *map(logging.getLogger, _FOREIGN)]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if logger is LOG and not quiet else logging.WARNING)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
