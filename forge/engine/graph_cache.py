"""Cache of captured decode steps, keyed by rows, sampling features and whether there are adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from forge.backend import Backend
from forge.engine.request_table import RequestTable
from forge.engine.sampler import Features
from forge.errors import OutOfMemoryError
from forge.state.model_state import ModelState

_MAX_GRAPHS = 16
"""Captured steps that are kept, the latest ones."""


class Key(NamedTuple):
    """What two steps with the same launches have in common."""

    rows: int
    penalized_rows: int
    num_top: int | None
    draws: bool
    is_adapted: bool


def bucket(rows: int, most: int) -> int:
    """Rows of the step that so many sequences run in: the next power of two, so that few steps are captured while the
    sequences end one by one. One row has kernels of its own and stays alone.

    The last bucket is `most` itself, power of two or not: a full batch computes no idle rows, and no memory is held for
    rows that never run.
    """
    return min(1 << (rows - 1).bit_length(), most)


class GraphCache:
    """Steps of the first rows of a request table, captured when they first run and replayed from then on."""

    def __init__(self, backend: Backend, table: RequestTable, state: ModelState, graphs: bool | int) -> None:
        self._backend, self._table, self._state, self._graphs = backend, table, state, graphs
        self._replays: dict[Key, Callable[..., list[Any] | None]] = {}
        self._generation = backend.step_generation
        self._until_compared = self._interval = 0 if isinstance(graphs, bool) else graphs

    def holds(self, rows: int, features: Features, *, is_adapted: bool) -> bool:
        """Whether a step of the first `rows` rows is there to be replayed. is_adapted: As in `run`."""
        is_valid = self._generation is self._backend.step_generation
        return is_valid and Key(rows, *features, is_adapted) in self._replays

    def run(self, rows: int, step: Callable[[int], list[Any]], *, is_adapted: bool) -> list[Any] | None:
        """Queue a step of the first `rows` rows, and return its arrays. `step` runs it where it is to be captured.

        is_adapted: Whether rows may have adapters, which the step then reads from the table.

        Returns None where a replay was compared with its launches and did something else. Earlier replays may have done
        so, too.

        `step` is not kept. It may be a method of the cache's owner: the two would be a cycle, and the device's memory
        would stay in use without the model until Python collects garbage.
        """
        table, key = self._table, Key(rows, *self._table.sampler.features, is_adapted)
        outputs: list[Any] | None
        with self._backend.active():  # no other thread gives memory back between the comparison and the replay
            if self._generation is not self._backend.step_generation:
                self._replays.clear()
            self._generation = self._backend.step_generation  # before a capture, which may change it
            if replay := self._replays.pop(key, None):
                outputs = self._replayed(replay)
        if replay is None:
            try:
                perturb = table.perturbed if self._graphs else None
                changing = [*table.changing(rows), *self._state.changing(rows)]
                outputs, replay = self._backend.capture(partial(step, rows), changing, perturb)
            except OutOfMemoryError:
                self._replays.clear()  # without theirs the next try may have enough
                raise
            self._make_room(key)
        self._replays[key] = replay  # the latest last
        return outputs

    def _replayed(self, replay: Callable[..., list[Any] | None]) -> list[Any] | None:
        """A replay's arrays. Every so many are compared with their launches."""
        if self._interval and self._until_compared <= 1:
            self._until_compared = self._interval
            return replay(compare=True)
        self._until_compared -= 1
        return replay()

    def _make_room(self, key: Key) -> None:
        if key.penalized_rows:  # steps that were captured with a smaller history keep it in use
            self._replays = {k: r for k, r in self._replays.items() if k.penalized_rows in (0, key.penalized_rows)}
        if len(self._replays) >= _MAX_GRAPHS:
            del self._replays[next(iter(self._replays))]
