"""The lock of a device: one thread at a time launches, and lets others while it waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident


class DeviceLock:
    """A thread may hold it several times over."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._thread: int | None = None
        self._depth = 0
        """How often the thread that has it holds it."""

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._thread == get_ident()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            outer, self._thread = self._thread, get_ident()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self._thread = outer

    @contextmanager
    def released(self) -> Iterator[None]:
        """Others may have it meanwhile: the calling thread, which may hold it, launches nothing."""
        depth = self._depth if self.is_mine else 0
        if depth:
            self._thread, self._depth = None, 0
            for _ in range(depth):
                self._lock.release()
        try:
            yield
        finally:
            if depth:
                for _ in range(depth):
                    self._lock.acquire()
                self._thread, self._depth = get_ident(), depth
