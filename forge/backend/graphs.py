"""Captured steps: launches that are kept, and replayed as graphs of the driver where graphs compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

MAX_NODES = 190
"""Most launches of a graph. A longer step is several graphs: larger ones have gone wrong on AMD (ROCm/hip#3887)."""

Perturb = Callable[[list[Any]], list[Any]]
"""From values of a step's state, other values from which the step computes something else."""


class _Device(Protocol):
    """A device whose stream captures launches as graphs; copies may wait for it."""

    device: str

    def active(self) -> AbstractContextManager[None]: ...

    def to_numpy(self, array: Any) -> Any: ...

    def upload(self, array: Any, values: Any) -> None: ...

    def poison(self, array: Any) -> None:
        """Set every byte of an array to 255, which makes floats NaN."""

    def snapshot(self, array: Any) -> Any:
        """A copy of an array on the device, in order with the ops before and after."""


class _Memory(Protocol):
    """Memory that steps share, one behind the other."""

    generation: object
    """Another one whenever memory may have gone back to the driver."""

    def noted(self) -> AbstractContextManager[Callable[[Any], bool]]:
        """Arrays that are made within it are in this memory. Gives what says of an argument whether it is one."""

    def borrowed(self, array: Any) -> Any:
        """The same array, without keeping its memory from other steps."""


class Launch(NamedTuple):
    """A launch of a captured step."""

    call: Callable[[], Any]
    kept: object
    """What must stay alive for it: the kernel, packed arguments, arrays that the step did not make."""
    capturable: bool
    """Whether it can be a part of a graph."""


class Graphs:
    """The captured steps of one GPU: replayed as graphs until one fails or computes something else."""

    def __init__(self, device: _Device, stream: Any, memory: _Memory) -> None:
        self._device, self._stream, self._memory = device, stream, memory
        self.is_enabled = True
        self._log: list[Launch] | None = None
        self._is_shared: Callable[[Any], bool] = lambda array: False
        """Of an array, whether its memory is shared with other steps."""

    @property
    def is_capturing(self) -> bool:
        """Whether a step is being captured now."""
        return self._log is not None

    def call(
        self, call: Callable[[], Any], arrays: Sequence[Any], kept: object = None, *, capturable: bool = True
    ) -> None:
        """Launch something. While a step is captured, the launch is kept too, with what must stay alive for it.

        arrays: What it reads and writes, and other arguments. What the step itself has made of them is not kept.
        """
        call()
        if self._log is not None:
            lasting = [array for array in arrays if not self._is_shared(array)]
            self._log.append(Launch(call, (kept, lasting), capturable))

    def capture(
        self, step: Callable[[], T], state: Sequence[Any], perturb: Perturb | None
    ) -> tuple[T, Callable[..., T | None]]:
        """Run a step; its result, and a function that replays it: see `Backend.capture`.

        The launches are kept. What the step makes lies in memory that all steps share, one behind the other, so that
        its result is valid until the next step. A replay raises RuntimeError where that memory is gone.

        Launches are replayed as graphs. They are launched one by one where a product goes to BLAS, which CuPy does not
        capture on CUDA, and as soon as a capture fails or a graph computes something else.
        """
        device, log = self._device, list[Launch]()
        with device.active():
            before = [device.to_numpy(array) for array in state] if self.is_enabled and perturb else []
            self._log, generation = log, self._memory.generation
            try:
                with self._memory.noted() as self._is_shared:
                    result = _borrowed(self._memory, step())
            finally:
                self._log, self._is_shared = None, lambda array: False
            results = arrays_in(result)
            is_whole = generation is self._memory.generation

            def launches() -> None:
                for launch in log:
                    launch.call()

            graph = self._graph(log) if self.is_enabled and perturb and is_whole else None
            if graph and perturb and checked(device, graph, launches, results, state, before, perturb) is launches:
                self.is_enabled, graph = False, None

        def replay(compare: bool = False) -> T | None:
            with device.active():
                if generation is not self._memory.generation:
                    raise RuntimeError("a captured step's memory is gone")
                if graph is None or not self.is_enabled:
                    launches()
                elif not compare:
                    graph()
                elif not compared(device, graph, launches, results, state):
                    self.is_enabled = False
                    return None
            return result

        return result, replay

    def _graph(self, log: list[Launch]) -> Callable[[], None] | None:
        """What launches the log as graphs; None where it cannot be captured.

        Within `active`, whose own errors would hide the driver's from the fallback.
        """
        if not all(launch.capturable for launch in log):
            return None
        graphs = []
        try:
            for start in range(0, len(log), MAX_NODES):
                self._stream.begin_capture()
                try:
                    for launch in log[start : start + MAX_NODES]:
                        launch.call()
                finally:
                    graphs.append(self._stream.end_capture())
        except RuntimeError as error:  # what CuPy and the driver raise
            self.is_enabled = False
            reason = " ".join(str(error).split())
            warnings.warn(
                f"{self._device.device}: steps are launched one by one, not as a graph: {reason}", stacklevel=2
            )
            return None

        def replay(kept: object = log) -> None:  # the log keeps the arrays alive that graphs read and write
            for graph in graphs:
                graph.launch(self._stream)

        return replay


def checked(
    device: _Device,
    graph: Callable[[], None],
    launches: Callable[[], None],
    results: Sequence[Any],
    state: Sequence[Any],
    before: list[Any],
    perturb: Perturb,
) -> Callable[[], None]:
    """`graph`, if from the state `before` it does bit for bit what `launches` just did; else `launches`.

    A graph that differs or cannot be launched is a warning of one line. In the end results and state are those of one
    step. Before the graph runs, the launches run from a perturbed state: intermediate arrays, keys and values then hold
    something else, and a graph that does nothing, or only a part of the step, is found out.
    """
    written = (*results, *state)
    expected = _bits(device, written)
    _restore(device, state, perturb(before))
    launches()
    for array in results:
        device.poison(array)
    _restore(device, state, before)
    found, reason = _replayed(device, graph, written)
    if found == expected:
        return graph
    reason = reason or "it computes something else"
    warnings.warn(f"{device.device}: steps are launched one by one, not as a graph: {reason}", stacklevel=2)
    _restore(device, state, before)
    launches()
    return launches


def compared(
    device: _Device,
    graph: Callable[[], None],
    launches: Callable[[], None],
    results: Sequence[Any],
    state: Sequence[Any],
) -> bool:
    """Replay a step, then launch it from the same state; whether both did the same bit for bit.

    A difference is a warning. Nothing waits between earlier work and the replay, because drivers have mixed things up
    there (ROCm/hip#3902). In the end results and state are those of the launches.
    """
    written = (*results, *state)
    before = [device.snapshot(array) for array in state]
    found, reason = _replayed(device, graph, written)
    _restore(device, state, [device.to_numpy(array) for array in before])
    launches()
    if found == _bits(device, written):
        return True
    warnings.warn(
        f"{device.device}: steps are launched one by one from now on, not as a graph: "
        f"{reason or 'a replay computed something else'}; tokens since the comparison before may be wrong",
        stacklevel=2,
    )
    return False


def _replayed(device: _Device, graph: Callable[[], None], written: Sequence[Any]) -> tuple[list[bytes], str]:
    """The bits that a graph leaves in arrays; none, and the reason, where it cannot be launched."""
    try:
        graph()
        return _bits(device, written), ""
    except RuntimeError as error:  # what CuPy and the driver raise
        return [], " ".join(str(error).split())


def _bits(device: _Device, arrays: Sequence[Any]) -> list[bytes]:
    return [device.to_numpy(array).tobytes() for array in arrays]


def _restore(device: _Device, state: Sequence[Any], values: Sequence[Any]) -> None:
    for array, value in zip(state, values, strict=True):
        device.upload(array, value)


def _borrowed(memory: _Memory, result: T) -> T:
    """A step's result whose arrays do not keep their memory from other steps."""
    found: Any = result
    if isinstance(found, list | tuple):
        found = type(found)(_borrowed(memory, part) for part in found)
    elif found is not None:
        found = memory.borrowed(found)
    same: T = found
    return same


def arrays_in(result: Any) -> list[Any]:
    """The arrays of a step's result: one, or lists and tuples of them."""
    if isinstance(result, list | tuple):
        return [array for part in result for array in arrays_in(part)]
    return [] if result is None else [result]
