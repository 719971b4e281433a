"""Captured steps on a driver that is played: which become graphs, in how many pieces, what happens where none can."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from forge.backend.graphs import Graphs


class Stream:
    """Runs launches at once, or puts them into the graph that is captured."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None
        self.fault: str | None = None
        self.num_graph_launches = 0

    def run(self, launch: Callable[[], None]) -> None:
        if self.captured is None:
            launch()
        else:
            self.captured.append(launch)

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> Graph:
        captured, self.captured = self.captured, None
        if self.fault:
            raise RuntimeError(self.fault)
        assert captured is not None
        return Graph(captured)


class Graph:
    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self.launches = launches

    def launch(self, stream: Stream) -> None:
        stream.num_graph_launches += 1
        for launch in self.launches:
            launch()


class Memory:
    """Arrays own theirs."""

    generation: object = None

    def noted(self) -> AbstractContextManager[Callable[[Any], bool]]:
        return nullcontext(lambda array: False)

    def borrowed(self, array: Any) -> Any:
        return array


class Device:
    """Arrays are NumPy's. A step adds 1 to `count` so many times, and leaves it doubled in `result`."""

    device = "played"

    def __init__(self) -> None:
        self.stream = Stream()
        self.graphs = Graphs(self, self.stream, Memory())
        self.count, self.result = np.zeros(1), np.zeros(1)

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def to_numpy(self, array: Any) -> Any:
        return array.copy()

    snapshot = to_numpy

    def upload(self, array: Any, values: Any) -> None:
        array[...] = values

    def poison(self, array: Any) -> None:
        array[...] = np.nan

    def step(self, additions: int, *, capturable: bool = True) -> Any:
        def add() -> None:
            self.count += 1

        def double() -> None:
            self.result[...] = 2 * self.count

        for launch in (*[add] * additions, double):
            self.graphs.call(lambda launch=launch: self.stream.run(launch), (), capturable=capturable)  # type: ignore[misc]
        return self.result

    def capture(self, additions: int, **options: bool) -> Callable[..., Any]:
        result, replay = self.graphs.capture(
            lambda: self.step(additions, **options), [self.count], lambda state: [state[0] + 5]
        )
        assert (result[0], self.count[0]) == (2 * additions, additions)  # as if it had run once
        return replay


@pytest.mark.parametrize(("additions", "pieces"), [(1, 1), (189, 1), (190, 2), (400, 3)])
def test_a_step_is_replayed_as_graphs_of_few_launches(additions: int, pieces: int) -> None:
    device = Device()
    replay = device.capture(additions)
    before = device.stream.num_graph_launches
    assert replay()[0] == 4 * additions
    assert device.stream.num_graph_launches - before == pieces
    assert replay(compare=True)[0] == 6 * additions
    assert device.count[0] == 3 * additions
    assert not device.graphs.is_capturing


def test_a_launch_that_no_graph_takes_has_its_step_launched_one_by_one() -> None:
    device = Device()
    replay = device.capture(2, capturable=False)
    assert replay()[0] == 8
    assert device.stream.num_graph_launches == 0
    assert device.graphs.is_enabled


def test_without_a_way_to_perturb_steps_are_launched_one_by_one() -> None:
    device = Device()
    _, replay = device.graphs.capture(lambda: device.step(1), [device.count], None)
    replay()
    assert (device.count[0], device.stream.num_graph_launches) == (2, 0)


def test_a_capture_that_fails_is_a_warning_and_the_last_one() -> None:
    device = Device()
    device.stream.fault = "no\ngraphs"
    with pytest.warns(UserWarning, match="^played: steps are launched one by one, not as a graph: no graphs$"):
        replay = device.capture(1)
    device.stream.fault = None
    assert replay()[0] == 4
    assert not device.graphs.is_enabled
    device.count[...] = 0
    device.capture(1)()
    assert device.stream.num_graph_launches == 0


def test_a_replay_that_goes_stale_ends_all_graphs() -> None:
    device = Device()
    replay, other = device.capture(1), None
    assert replay()[0] == 4
    Graph.launch, real = (lambda self, stream: None), Graph.launch  # type: ignore[method-assign]
    try:
        with pytest.warns(UserWarning, match="from now on, not as a graph: a replay computed something else"):
            other = replay(compare=True)
    finally:
        Graph.launch = real  # type: ignore[method-assign]
    assert other is None
    assert (device.count[0], device.result[0]) == (3, 6)  # what the launches did
    assert replay()[0] == 8
    assert not device.graphs.is_enabled
