"""The models that are loaded in this process, and what becomes of them where it forks or ends.

A fork leaves no threads, and locks that they may have held for ever.
"""

from __future__ import annotations

import atexit
import os
import time
from functools import cache
from weakref import WeakSet

from forge.runtime.loop import EngineLoop

_EXIT_S = 0.5
"""How long the interpreter's exit waits for steps under way."""
_SETTLE_S = 1.0
"""How long a fork waits for threads to notice that their work has ended."""

_ENDING_S = 5.0
"""How long a load waits for models that are being closed."""

_watched: WeakSet[EngineLoop] = WeakSet()


def watch(loop: EngineLoop) -> None:
    """From here on a fork, and the end of the process, are noticed."""
    _register()
    _watched.add(loop)


def loaded() -> list[EngineLoop]:
    """Those that have not ended, in the order in which they were loaded."""
    return sorted((loop for loop in list(_watched) if not loop.has_ended), key=lambda loop: loop.number)


def wait_for_closed() -> None:
    """Wait for models that nobody can use any more and that still hold memory: their last step is under way."""
    deadline = time.monotonic() + _ENDING_S
    for loop in loaded():
        if loop.is_closed:
            loop.wait_for_end(deadline - time.monotonic())


@cache
def _register() -> None:
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
    atexit.register(_at_exit)


def _at_exit() -> None:
    """No thread is left in the middle of a step, if the step takes no longer than a moment."""
    watched = list(_watched)
    for loop in watched:
        loop.stop(frees=False)
    deadline = time.monotonic() + _EXIT_S
    for loop in watched:
        loop.wait_for_end(deadline - time.monotonic())


def _before_fork() -> None:
    """A call that has just returned must not make the child's models unusable."""
    for loop in list(_watched):
        loop.settle(_SETTLE_S)


def _in_child() -> None:
    """One that was busy makes all unusable: its thread may have been within BLAS or another library that all share."""
    watched = list(_watched)
    is_busy = any(loop.is_busy() for loop in watched)
    for loop in watched:
        if is_busy or not loop.survives():
            loop.lose()
        else:
            loop.restart()
