"""Recorded decode steps: what a step launches depends on few numbers, and is recorded once for each set of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from forge.backend import Backend
from forge.engine.request_table import Slots
from forge.errors import OutOfMemoryError

_MAX_PLANS = 16
"""Recorded steps that are kept, of those that ran lately: each holds memory of its own for what lies within a step."""


class Key(NamedTuple):
    """What two steps with the same launches have in common."""

    rows: int
    penalized_slots: int
    num_top: int | None
    draws: bool


def bucket(rows: int, most: int) -> int:
    """Rows of the step that so many sequences run in: the next power of two, so that few steps are recorded while they
    end one by one; one row has kernels of its own and stays alone.

    The last bucket is `most` itself, power of two or not: a full batch computes no idle rows, and no memory is held for
    rows that never run.
    """
    return min(1 << (rows - 1).bit_length(), most)


class GraphCache:
    """Steps of the first rows of these slots, recorded when they first run and replayed from then on."""

    def __init__(self, backend: Backend, slots: Slots, graphs: bool | int = True) -> None:
        self._backend, self._slots, self._graphs = backend, slots, graphs
        self._replays: dict[Key, Callable[..., list[Any] | None]] = {}
        self._until_compared = self._interval = 0 if isinstance(graphs, bool) else graphs

    def run(self, rows: int, step: Callable[[int], list[Any]]) -> list[Any] | None:
        """Queue a step, which `step` runs for so many rows; what it gives.

        None where it was replayed to be compared and did something else: so may the replays before it have done.

        `step` is not kept. Where it is a method of what holds these plans, they would be a cycle, and the device's
        memory would stay in use without the model until Python collects garbage.
        """
        slots = self._slots
        key = Key(rows, slots.penalized_slots, slots.num_top, slots.draws)
        outputs: list[Any] | None
        replay = self._replays.pop(key, None)
        if replay is None:
            try:
                perturb = slots.perturbed if self._graphs else None
                outputs, replay = self._backend.capture(lambda: step(rows), slots.advancing(rows), perturb)
            except OutOfMemoryError:
                self._replays.clear()  # without theirs the next try may have enough
                raise
            self._make_room(key)
        elif self._interval and self._until_compared <= 1:
            self._until_compared = self._interval
            outputs = replay(compare=True)
        else:
            self._until_compared -= 1
            outputs = replay()
        self._replays[key] = replay  # the latest last
        return outputs

    def _make_room(self, key: Key) -> None:
        if key.penalized_slots:  # those of a history that was made anew keep the old one
            self._replays = {k: r for k, r in self._replays.items() if k.penalized_slots in (0, key.penalized_slots)}
        if len(self._replays) >= _MAX_PLANS:
            del self._replays[next(iter(self._replays))]
