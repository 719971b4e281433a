"""What engines ask of a backend beside launches, where its arrays lie in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forge.backend import graphs


class HostMemory:
    """What `graphs` asks of a device beside a backend's methods, where arrays lie in the host's memory."""

    def poison(self, array: Any) -> None:
        np.asarray(array).view(np.uint8)[...] = 255

    def snapshot(self, array: Any) -> Any:
        return np.array(array)


class Replayed:
    """In front of a device: its recorded launches run again on the arrays they had."""

    log: list[tuple[Any, ...]] | None = None
    replays = 0
    stale_after: int | None = None
    """Replays after which the driver leaves out a step's first launch: the others find what an earlier step had."""
    has_graphs = True

    def capture(self, step: Callable[[], Any], state: Any, perturb: Any) -> tuple[Any, Callable[[], Any]]:
        self.log = log = []
        try:
            result = step()
        finally:
            self.log = None

        def launches(first: int = 0) -> None:
            for launch in log[first:]:
                self._run(*launch)

        def graph() -> None:
            launches(self.stale_after is not None and self.replays > self.stale_after)

        def again(compare: bool = False) -> Any:
            if perturb is None or not self.has_graphs:
                launches()
                return result
            self.replays += 1
            if not compare:
                graph()
            elif not graphs.compared(self, graph, launches, graphs.arrays_in(result), state):
                self.has_graphs = False
                return None
            return result

        return result, again

    def _run(self, entry: Any, grid: tuple[int, ...], args: list[Any]) -> None:
        super()._run(entry, grid, args)  # type: ignore[misc]
        if self.log is not None:
            self.log.append((entry, grid, args))
