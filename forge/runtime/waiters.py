"""Where callers wait for what the engine's thread delivers: threads, and tasks of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from queue import Empty, SimpleQueue
from typing import Any

from forge.errors import ForgeError

PATIENCE_S = 0.1
"""Longest wait for a lock. While the main thread waits, it does not see a signal that the kernel gives to another
thread: it waits anew."""


class Waiter:
    """The place where a thread waits for its request.

    The caller alone holds it. When it is gone, the engine's thread ends the request.
    """

    def __init__(
        self,
        refusal: Callable[[], str | None],
        released: Callable[[], AbstractContextManager[None]] = nullcontext[None],
    ) -> None:
        """refusal: why nothing will be delivered any more; None while something may. released: As of `Backend`: the
        thread may be that of another model on the same device, in a function of the user's."""
        self._refusal, self._released = refusal, released
        self._messages: SimpleQueue[Any] = SimpleQueue()

    def deliver(self, message: Any) -> None:
        """Called by the engine's thread."""
        self._messages.put(message)

    def get(self) -> Any:
        """The next message. Raises it where it is an error."""
        with self._released():
            message = self._next()
        return _result(message)

    def _next(self) -> Any:
        while True:
            with suppress(Empty):
                return self._messages.get(timeout=PATIENCE_S)
            if (refusal := self._refusal()) is not None and self._messages.empty():
                raise ForgeError(refusal)


class AsyncWaiter:
    """The place where a task waits for its request. Make it in the task's event loop."""

    def __init__(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    def deliver(self, message: Any) -> None:
        """Called by the engine's thread. Raises RuntimeError where the event loop is closed."""
        self._event_loop.call_soon_threadsafe(self._messages.put_nowait, message)

    async def get(self) -> Any:
        """The next message. Raises it where it is an error."""
        message = await self._messages.get()
        return _result(message)


def _result(message: Any) -> Any:
    """What was delivered. Raises an error of the caller's own where it is one, which other callers may get too.

    Its cause is the one of the engine's thread, with that thread's traceback.
    """
    if not isinstance(message, BaseException):
        return message
    if (own := _copied(message)) is not message:
        own.__cause__ = message if message.__traceback__ else None  # else it would be shown twice
    raise own


def _copied(error: BaseException) -> BaseException:
    """An error with the same type, message and attributes; the error itself where its class allows no copy."""

    def without_init(_: BaseException) -> BaseException:
        own: BaseException = type(error).__new__(type(error), *error.args)
        own.__dict__.update(error.__dict__)
        return own

    for make in (copy, without_init):  # its __init__ may take other arguments than `args`
        with suppress(Exception):
            own = make(error)
            if type(own) is type(error) and str(own) == str(error):
                return own
    return error
