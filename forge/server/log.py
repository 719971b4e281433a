"""Log lines of the server, for people: one for each request, without escape sequences that a client sent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from forge.display import printable

LOG = logging.getLogger("forge.server")
_FOREIGN = ("uvicorn.error", "asyncio")
"""Loggers of libraries, whose warnings are shown."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{self.formatTime(record, '%H:%M:%S')} {text}"


@contextmanager
def to_stderr(*, quiet: bool = False) -> Iterator[None]:
    """Write the log to stderr. quiet: warnings and errors alone."""
    handler = logging.StreamHandler()
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
