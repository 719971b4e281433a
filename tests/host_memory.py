"""What engines ask of a backend beside launches, where its arrays lie in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class HostMemory:
    """Copies to and from a backend whose arrays are NumPy's."""

    @contextmanager
    def active(self) -> Iterator[None]:
        yield

    def upload(self, array: Any, values: Any) -> None:
        np.copyto(np.asarray(array), values)

    def spoil(self, array: Any) -> None:
        np.asarray(array).view(np.uint8)[...] = 255

    def shared(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        array = self.empty(shape, dtype)  # type: ignore[attr-defined]
        return array, np.asarray(array)

    def mark(self) -> Callable[[], None]:
        return lambda: None


class Replayed:
    """In front of a device: its recorded launches run again on the arrays they had."""

    log: list[tuple[Any, ...]] | None = None
    replays = 0

    def record(self, step: Callable[[], Any], state: Any, disturb: Any) -> tuple[Any, Callable[[], Any]]:
        self.log = log = []
        try:
            result = step()
        finally:
            self.log = None

        def again() -> Any:
            self.replays += 1
            for launch in log:
                self._run(*launch)
            return result

        return result, again

    def _run(self, entry: Any, grid: tuple[int, ...], args: list[Any]) -> None:
        super()._run(entry, grid, args)  # type: ignore[misc]
        if self.log is not None:
            self.log.append((entry, grid, args))

    def prepare(self, run: Callable[[], None], progress: Any = None) -> None:
        """Nothing is compiled ahead: the harness compiles what it launches."""
