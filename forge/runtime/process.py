"""What becomes of loaded models where the process forks or ends.

A fork leaves no threads, and locks that they may have held for ever.
"""

from __future__ import annotations

import atexit
import os
import time
from functools import cache
from typing import Protocol
from weakref import WeakSet

REFUSAL = (
    "loaded before the process was forked, on a GPU or while requests were running: load it in the child, or use "
    "multiprocessing's spawn"
)
EXITS = "the interpreter is exiting"
_EXIT_S = 0.5
"""How long the interpreter's exit waits for steps under way."""
_SETTLE_S = 1.0
"""How long a fork waits for threads to notice that their work has ended."""


class Threaded(Protocol):
    """What has a thread. `settle` is called before a fork, the next four in its child, the others where the process
    ends."""

    def settle(self, seconds: float) -> None:
        """Wait until work that nobody waits for any more has ended, for so long at most."""
        ...

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

    def stop(self, *, frees: bool) -> None:
        """Have the thread end. frees: whether it gives memory back first."""
        ...

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the thread has ended, if there is one, for so long at most."""
        ...


_watched: WeakSet[Threaded] = WeakSet()


def watch(one: Threaded) -> None:
    """From here on a fork, and the end of the process, are noticed."""
    _register()
    _watched.add(one)


@cache
def _register() -> None:
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
    atexit.register(_at_exit)


def _at_exit() -> None:
    """No thread is left in the middle of a step, if the step takes no longer than a moment."""
    watched = list(_watched)
    for one in watched:
        one.stop(frees=False)
    deadline = time.monotonic() + _EXIT_S
    for one in watched:
        one.wait_for_end(deadline - time.monotonic())


def _before_fork() -> None:
    """A call that has just returned must not make the child's models unusable."""
    for one in list(_watched):
        one.settle(_SETTLE_S)


def _in_child() -> None:
    """One that was busy makes all unusable: its thread may have been within BLAS or another library that all share."""
    watched = list(_watched)
    is_busy = any(one.is_busy() for one in watched)
    for one in watched:
        if is_busy or not one.survives():
            one.lose()
        else:
            one.restart()
