"""A replayed step is compared with its launches when it is made, and not used where it computes something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness
from host_memory import HostMemory

from forge.backend.graphs import arrays_in, checked, compared
from forge.ops.decode_state import advance
from forge.ops.embed import take_rows

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")


class Device(HostMemory, Harness):
    """The harness, with copies."""


class Step:
    """Of two rows: results are rows of a table that the last ids name, by way of an intermediate array."""

    def __init__(self) -> None:
        self.device = Device(32)
        self.ids, self.slots, self.last_ids, self.lengths = (
            self.device.asarray(np.array(values, np.int32)) for values in ([7, 8], [0, 1], [3, 4], [10, 20])
        )
        self.table = self.device.asarray(np.array([[9.0], [9.0], [9.0], [0.0], [2.5], [7.0]], np.float32))
        self.middle = self.result = self.device.empty((2, 1), np.float32)
        self.runs = 0

    def launches(self) -> None:
        self.runs += 1
        self.middle = take_rows(self.last_ids, self.table)
        self.second_half()

    def second_half(self) -> None:
        self.device.upload(self.result, self.device.to_numpy(self.middle))
        advance(self.ids, self.slots, self.last_ids, self.lengths, None, None, None, None)

    def check(self, graph: Callable[[], None]) -> Callable[[], None]:
        state = [self.last_ids, self.lengths]
        before = [self.device.to_numpy(array) for array in state]
        self.launches()
        return checked(self.device, graph, self.launches, [self.result], state, before, self.perturb)

    @staticmethod
    def perturb(state: list[Any]) -> list[Any]:
        last_ids, lengths = state
        return [last_ids + 1, lengths]

    def assert_advanced_once(self) -> None:
        assert self.result.tolist() == [[0.0], [2.5]]
        assert (self.last_ids.tolist(), self.lengths.tolist()) == ([7, 8], [11, 21])


def test_a_graph_that_repeats_its_launches_is_used() -> None:
    step = Step()

    def graph() -> None:
        step.launches()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step.check(graph) is graph
    step.assert_advanced_once()


def nothing(step: Step) -> None:
    pass


def only_the_second_half(step: Step) -> None:
    step.second_half()


def wrong_result(step: Step) -> None:
    step.launches()
    np.asarray(step.result)[1] += 1


def wrong_sign_of_zero(step: Step) -> None:
    step.launches()
    np.asarray(step.result)[0] *= -1


def wrong_state(step: Step) -> None:
    step.launches()
    np.asarray(step.lengths)[1] += 1


def no_launch(step: Step) -> None:
    raise RuntimeError("the driver\nsays no")


@pytest.mark.parametrize(
    "wrong", [nothing, only_the_second_half, wrong_result, wrong_sign_of_zero, wrong_state, no_launch]
)
def test_another_is_not(wrong: Callable[[Step], None]) -> None:
    step = Step()
    reason = "the driver says no" if wrong is no_launch else "it computes something else"
    with pytest.warns(UserWarning, match=f"^harness: steps are launched one by one, not as a graph: {reason}$"):
        replay = step.check(lambda: wrong(step))
    assert replay == step.launches
    step.assert_advanced_once()


def test_results_are_found_in_lists_and_tuples() -> None:
    first, second, third = (np.zeros(size) for size in (1, 2, 3))
    found: list[Any] = arrays_in([first, (second, [third]), None])
    assert [array.size for array in found] == [1, 2, 3]


# While a model runs, every Nth replay is compared


class Later(Step):
    """A step that has run, and comes again."""

    def __init__(self) -> None:
        super().__init__()
        self.result = self.device.empty((2, 1), np.float32)
        self.launches()
        self.device.upload(self.last_ids, np.array([3, 4], np.int32))
        self.device.upload(self.lengths, np.array([10, 20], np.int32))
        self.device.poison(self.result)
        self.device.poison(self.middle)
        self.runs = 0

    def compared(self, graph: Callable[[], None]) -> bool:
        return compared(self.device, graph, self.launches, [self.result], [self.last_ids, self.lengths])


def test_a_replay_that_repeats_its_launches_goes_on() -> None:
    step = Later()

    def graph() -> None:
        step.launches()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step.compared(graph)
    assert step.runs == 2
    step.assert_advanced_once()


@pytest.mark.parametrize(
    "wrong", [nothing, only_the_second_half, wrong_result, wrong_sign_of_zero, wrong_state, no_launch]
)
def test_another_is_told_of_once_and_undone(wrong: Callable[[Step], None]) -> None:
    step = Later()
    reason = "the driver says no" if wrong is no_launch else "a replay computed something else"
    with pytest.warns(
        UserWarning, match=f"^harness: steps are launched one by one from now on, .*: {reason}; tok"
    ) as said:
        assert not step.compared(lambda: wrong(step))
    assert len(said) == 1
    step.assert_advanced_once()
