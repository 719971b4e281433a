"""How many threads compute on the CPU: NumPy's BLAS, of which a process has one, its calls, the loading of weights."""

from __future__ import annotations

import os
import time
from _thread import start_new_thread
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from forge.backend.cgroups import groups, read_text
from forge.errors import ParameterError

_FIRST_S = 0.3
"""After so long the load of the CPUs is known well enough: it is counted in steps of 10 ms."""
_EVERY_S = 1.0
_SPARE = 0.25
"""Others may take so much of a CPU before it counts as theirs."""
_SMALL_MATRIX_CORES = frozenset(("SkylakeX", "Cooperlake", "SapphireRapids"))
"""OpenBLAS's names of the CPUs with AVX-512, for which it multiplies small float32 matrices without packing them."""
_BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat, proc_stat(5): all but idle, waiting for a disk, and guests, which the first ones include."""


class Threads:
    """Sets the number of threads of BLAS, for the whole process: what was asked for, or as many as do not wait.

    The threads of a product wait for the last one. One whose CPU another process uses holds them all up: on 2 CPUs, one
    of them busy, a product on both takes 5 to 15 times as long as on one. So CPUs that others use are left to them, and
    once a second while steps run it is looked which these are. Each number of threads computes the same sums.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._asked: int | None = None
        self._pools: list[Any] | None = None
        self._most = 1
        self._set: int | None = 0
        self._seen = _Load(0.0, 0.0, 0.0)
        self._next = float("inf")
        self._helpers = _Helpers()

    def use(self, count: int | None) -> None:
        """From here on so many threads; None = as many as do not wait. The last word counts, for all models."""
        pools = self._find()
        if count is not None and not pools:
            message = "threads cannot be set for the BLAS of this NumPy"
            raise ParameterError(message, parameter="threads", hint="leave it out")
        self._asked = count
        if self.current != self._set:
            self._most = min(
                usable_cpus(self._root), self.current or 1
            )  # what OPENBLAS_NUM_THREADS says, or the program
        self._seen = self._look()
        self._next = self._seen.time + _FIRST_S if pools and count is None else float("inf")
        self._apply(count or self._most)

    @property
    def count(self) -> int:
        """Threads to load with."""
        return self._asked or usable_cpus(self._root)

    @property
    def current(self) -> int | None:
        """Threads that BLAS has now; None where that is not known."""
        pools = self._find()
        return int(pools[0].num_threads) if pools else None

    @property
    def has_small_matrix_kernels(self) -> bool:
        """Whether BLAS multiplies by small matrices about as fast as by a vector."""
        return any(getattr(pool, "architecture", None) in _SMALL_MATRIX_CORES for pool in self._find())

    def share(self, work: Callable[[int, int], None], size: int) -> None:
        """Call work(start, stop) for parts of range(size), on as many threads as BLAS has now.

        The calls of NumPy in it let other threads run, so that they take their time at once.
        """
        count = max(min(self.current or 1, size), 1)
        if self._helpers.process != os.getpid():  # a fork leaves no threads
            self._helpers = _Helpers()
        self._helpers.run(work, [size * part // count for part in range(count + 1)])

    def adjust(self) -> None:
        """Leave CPUs to others that use them, and take them back, if it is time to look."""
        if time.monotonic() < self._next:
            return
        before, self._seen = self._seen, self._look()
        is_fresh = self._seen.time - before.time < 2 * _EVERY_S  # else it is how busy they were while nothing ran
        self._next = self._seen.time + (_EVERY_S if is_fresh else _FIRST_S)
        if self.current == self._set:  # else the program itself has set another number meanwhile
            free = len(os.sched_getaffinity(0)) - self._seen.others_since(before)
            self._apply(min(max(int(free + _SPARE), 1), self._most))

    def _find(self) -> list[Any]:
        """The thread pools of BLAS, by way of which their numbers are set."""
        if self._pools is None:
            import numpy as np  # noqa: F401 (it brings its BLAS)
            from threadpoolctl import ThreadpoolController

            self._pools = ThreadpoolController().select(user_api="blas").lib_controllers
        return self._pools

    def _apply(self, count: int) -> None:
        for pool in self._find():
            # From 3.7 on threadpoolctl obeys one thread alone where BLAS has one number for all: the first that sets
            # it, which may be a thread of the process that this one was forked from. It also waits for locks of Python,
            # which a thread may hold where a signal handler interrupts it. Its own function below that does neither.
            getattr(pool, "_real_set_num_threads", pool.set_num_threads)(count)
        self._set = self.current

    def _look(self) -> _Load:
        return _Load(time.monotonic(), _busy_seconds(os.sched_getaffinity(0), self._root), time.process_time())


class _Helpers:
    """Threads of this process that wait for calls. They are started when they are needed."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._count = 0
        self._calls: SimpleQueue[tuple[Future[None], Callable[[int, int], None], int, int]] = SimpleQueue()

    def run(self, work: Callable[[int, int], None], bounds: list[int]) -> None:
        """work(bounds[i], bounds[i + 1]) for each i, the last of them by the caller."""
        *others, last = pairwise(bounds)
        with suppress(RuntimeError):  # the system may give no more threads: then there are fewer helpers
            while self._count < len(others):
                start_new_thread(self._help, ())  # `Thread.start` would wait for the lock that `_apply` speaks of
                self._count += 1
        if not self._count:
            others, last = [], (bounds[0], bounds[-1])
        results: list[Future[None]] = []
        for part in others:
            results.append(Future())
            self._calls.put((results[-1], work, *part))
        try:
            work(*last)
        finally:  # no other thread writes to arrays that the caller has given up
            errors = [result.exception() for result in results]
        for error in filter(None, errors):
            raise error

    def _help(self) -> None:
        while True:
            result, work, start, stop = self._calls.get()
            try:
                result.set_result(work(start, stop))
            except BaseException as error:
                result.set_exception(error)
            del result, work  # else what they hold would live until the next call


@dataclass(frozen=True, slots=True)
class _Load:
    """Seconds: now, of all CPUs at work, and of this process at work."""

    time: float
    busy: float
    own: float

    def others_since(self, before: _Load) -> float:
        """CPUs that other processes kept busy, on average."""
        passed = max(self.time - before.time, 1e-9)
        return max(self.busy - before.busy - max(self.own - before.own, 0.0), 0.0) / passed


def usable_cpus(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, two threads of a core being one, and by CPU time of its groups.

    Source: sched_setaffinity(2).
    """
    cores = {_siblings(cpu, root) for cpu in os.sched_getaffinity(0)}
    return max(int(min(len(cores), cpu_time(root))), 1)


def cpu_time(root: Path = Path("/")) -> float:
    """Seconds per second that the control groups of this process grant it, the least of nested ones; else infinity.

    Sources: cpu.max of cgroup version 2, cpu.cfs_quota_us of version 1.
    """
    least = float("inf")
    for group in groups("cpu", root):
        if group.is_v2:
            words = group.words("cpu.max")
            quota, period = words if len(words) == 2 else ("max", "")
        else:
            quota, period = (" ".join(group.words(f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and len(quota) < 20 and 0 < len(period) < 20 and int(period):
            least = min(least, int(quota) / int(period))
    return least


def _siblings(cpu: int, root: Path) -> str:
    """The CPUs that are threads of one core with it, as a name of the core."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return read_text(path).strip() or str(cpu)


def _busy_seconds(cpus: Collection[int], root: Path) -> float:
    """How long these CPUs were at work, in all."""
    names = {f"cpu{cpu}" for cpu in cpus}
    ticks = 0
    for line in read_text(root / "proc/stat").splitlines():
        name, *columns = line.split()[:9] or [""]
        if name not in names or len(columns) <= max(_BUSY):
            continue
        if all(column.isdecimal() and len(column) < 20 for column in columns):
            ticks += sum(int(columns[column]) for column in _BUSY)
    return ticks / os.sysconf("SC_CLK_TCK")


THREADS = Threads()
