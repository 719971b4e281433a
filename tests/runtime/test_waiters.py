"""Errors that callers get from the engine's thread."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from forge import ContextLengthError, OutOfMemoryError
from forge.runtime.waiters import AsyncWaiter, Waiter


class OfASize(Exception):
    """Its `args` are not what its __init__ takes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes are too many")
        self.size = size


class OfTwo(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


class Unique(Exception):
    def __new__(cls, *arguments: Any) -> Unique:
        if arguments:
            raise TypeError
        return super().__new__(cls)

    def __str__(self) -> str:
        return "unique"


def thrown(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as found:
        return found


def from_a_thread(error: BaseException) -> None:
    waiter = Waiter(lambda: None)
    waiter.deliver(error)
    waiter.get()


def from_a_task(error: BaseException) -> None:
    async def get() -> None:
        waiter = AsyncWaiter()
        waiter.deliver(error)
        await waiter.get()

    asyncio.run(get())


@pytest.mark.parametrize("get", [from_a_thread, from_a_task])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("once"),
        OutOfMemoryError("no room", parameter="context", hint="use less"),
        ContextLengthError("too long"),
        OSError(errno.ENOMEM, "no memory", "file"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
        OfASize(5),
        OfTwo("a", "b"),
    ],
    ids=repr,
)
def test_an_error_is_raised_as_a_copy_whose_cause_it_is(error: BaseException, get: Any) -> None:
    with pytest.raises(type(error)) as found:
        get(thrown(error))
    assert found.value is not error
    assert type(found.value) is type(error)
    assert (str(found.value), found.value.__dict__) == (str(error), error.__dict__)
    assert found.value.__cause__ is error


def test_an_error_that_was_never_raised_is_no_cause() -> None:
    """It would be printed twice."""
    with pytest.raises(OutOfMemoryError) as found:
        from_a_thread(OutOfMemoryError("no room"))
    assert found.value.__cause__ is None


def test_an_error_that_cannot_be_copied_is_raised_itself() -> None:
    error = thrown(Unique())
    error.args = ("x",)
    with pytest.raises(Unique) as found:
        from_a_thread(error)
    assert found.value is error
