"""Jobs on several threads, which Ctrl-C may interrupt anywhere."""

from __future__ import annotations

import time
from _thread import start_new_thread
from collections.abc import Callable, Collection
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.0005


def run_all(do: Callable[[T], object], jobs: Collection[T], threads: int, ended: Callable[[T], None]) -> None:
    """do(job) for each job on so many threads, and ended(job) on this one as each ends.

    The first error ends the jobs that have not begun, and is raised when the others have ended. Ctrl-C does the same,
    wherever it comes: in the midst of a call of `concurrent.futures` it leaves locks that its threads wait for.
    """
    waiting: SimpleQueue[T] = SimpleQueue()
    results: SimpleQueue[tuple[T, BaseException | None]] = SimpleQueue()
    over: list[None] = []  # an entry for each thread that has no more to do

    def work() -> None:
        with suppress(Empty):
            while True:
                job = waiting.get_nowait()
                try:
                    do(job)
                    results.put((job, None))
                except BaseException as caught:
                    results.put((job, caught))
        over.append(None)

    for job in jobs:
        waiting.put(job)
    started = 0
    error: BaseException | None = None
    try:
        with suppress(RuntimeError):  # the system may give no more threads: then there are fewer
            for _ in range(min(threads, len(jobs))):
                start_new_thread(work, ())
                started += 1
        if not started:
            work()
        for _ in jobs:
            job, error = results.get()
            if error is not None:
                raise error
            ended(job)
    finally:
        error = None  # else it and this frame, which its traceback holds, would keep each other and the job alive
        with suppress(Empty):
            while True:
                waiting.get_nowait()
        while len(over) < started:
            time.sleep(_POLL_S)
        with suppress(Empty):  # an error's traceback keeps `work`, and these jobs with it
            while True:
                results.get_nowait()
