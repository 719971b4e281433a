"""What a fork of the process leaves of a loaded model: no threads, and locks that they may have held for ever."""

from __future__ import annotations

import os
from functools import cache
from typing import Protocol
from weakref import WeakSet

REFUSAL = (
    "loaded before the process was forked, on a GPU or while requests were running: load it in the child, or use "
    "multiprocessing's spawn"
)


class Forked(Protocol):
    """What a fork copies. All methods are called in the child."""

    def is_busy(self) -> bool:
        """Whether anything was under way when the process forked."""
        ...

    def survives(self) -> bool:
        """Whether a child can use it at all."""
        ...

    def restart(self) -> None:
        """The child uses it, without the threads of the parent."""
        ...

    def lose(self) -> None:
        """The parent alone uses it from here on."""
        ...


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
    is_busy = any(one.is_busy() for one in watched)
    for one in watched:
        if is_busy or not one.survives():
            one.lose()
        else:
            one.restart()
