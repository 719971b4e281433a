"""What a fork of the process leaves of a loaded model: no threads, and locks that they may have held for ever."""

from __future__ import annotations

import os
from functools import cache
from typing import NoReturn, Protocol
from weakref import WeakSet

from forge.errors import ForgeError


class Forked(Protocol):
    """What a fork copies."""

    def _is_busy(self) -> bool:
        """Whether anything was under way when the process forked; called in the child."""
        ...

    def _survives(self) -> bool:
        """Whether it can be used in a child at all."""
        ...

    def _lose(self) -> None:
        """It is the parent's alone from here on."""
        ...


class ParentsLock:
    """In place of a lock, in a child that may not use what the lock guards."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> NoReturn:
        raise ForgeError(
            f"{self.what}: loaded before the process was forked, on a GPU or while requests were running: load it in "
            "the child, or use multiprocessing's spawn"
        )

    def __exit__(self, *_: object) -> None:
        """It is never entered."""


_watched: WeakSet[Forked] = WeakSet()


def watch(one: Forked) -> None:
    """From here on a fork is noticed."""
    _register()
    _watched.add(one)


@cache
def _register() -> None:
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    """One that was busy makes all unusable: its thread may have been within BLAS or another library that all share."""
    watched = list(_watched)
    busy = any(one._is_busy() for one in watched)
    for one in watched:
        if busy or not one._survives():
            one._lose()
