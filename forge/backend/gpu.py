"""What backends that run the kernels share: checks of each launch. CuPy and the CPU harness of the tests are two."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from forge.backend import sources
from forge.errors import UnsupportedError
from forge.tuning import Choices
from forge.tuning.kernel import Values


class _HasGPU(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def run_gpu(self) -> Callable[..., Any] | None: ...

    def check(self, args: Sequence[Any], options: dict[str, Any]) -> dict[str, int]: ...


class _HasCopies(Protocol):
    """What `checked` asks of a device; it may wait for it."""

    device: str

    def to_numpy(self, array: Any) -> Any: ...

    def upload(self, array: Any, values: Any) -> None: ...

    def poison(self, array: Any) -> None:
        """Every byte of it becomes 255: NaN."""

    def snapshot(self, array: Any) -> Any:
        """A copy on the device, in order with the ops before and after."""


_MIN_COUNTERS = 4096

Perturb = Callable[[list[Any]], list[Any]]
"""From the values of a step's state, others with which it computes something else, in the same places."""


def checked(
    device: _HasCopies,
    graph: Callable[[], None],
    launches: Callable[[], None],
    results: Sequence[Any],
    state: Sequence[Any],
    before: list[Any],
    perturb: Perturb,
) -> Callable[[], None]:
    """`graph`, if from the state before it does bit for bit what `launches` just did: their results, their new state.

    If not, or if the graph cannot be launched, `launches`, with a warning of one line. Either way results and state are
    in the end those of one step. Between, the launches run from a perturbed state, so that whatever lies between state
    and results (intermediate arrays, keys and values of the step) holds something else: a graph that does only a part
    of the step is found out, as is one that does nothing.
    """
    written = (*results, *state)
    expected = [device.to_numpy(array).tobytes() for array in written]
    _restore(device, state, perturb(before))
    launches()
    for array in results:
        device.poison(array)
    _restore(device, state, before)
    try:
        graph()
        if [device.to_numpy(array).tobytes() for array in written] == expected:
            return graph
        reason = "it computes something else"
    except RuntimeError as error:  # what CuPy and the driver raise
        reason = " ".join(str(error).split())
    warnings.warn(f"{device.device}: steps are launched one by one, not as a graph: {reason}", stacklevel=2)
    _restore(device, state, before)
    launches()
    return launches


def compared(
    device: _HasCopies,
    graph: Callable[[], None],
    launches: Callable[[], None],
    results: Sequence[Any],
    state: Sequence[Any],
) -> bool:
    """Replay a step, then launch it from the same state; whether both did the same bit for bit. If not, with a warning.

    Nothing waits between what was queued before and the replay: where nothing waits, drivers have mixed things up
    (ROCm/hip#3902). In the end results and state are those of the launches.
    """
    written = (*results, *state)
    before = [device.snapshot(array) for array in state]
    found: list[bytes] = []
    reason = "a replay computed something else"
    try:
        graph()
        found = [device.to_numpy(array).tobytes() for array in written]
    except RuntimeError as error:  # what CuPy and the driver raise
        reason = " ".join(str(error).split())
    _restore(device, state, [device.to_numpy(array) for array in before])
    launches()
    if found == [device.to_numpy(array).tobytes() for array in written]:
        return True
    warnings.warn(
        f"{device.device}: steps are launched one by one from now on, not as a graph: {reason}; tokens since the "
        "comparison before may be wrong",
        stacklevel=2,
    )
    return False


def _restore(device: _HasCopies, state: Sequence[Any], values: Sequence[Any]) -> None:
    for array, value in zip(state, values, strict=True):
        device.upload(array, value)


def arrays_in(result: Any) -> list[Any]:
    """The arrays of a step's result: one, or lists and tuples of them."""
    if isinstance(result, list | tuple):
        return [array for part in result for array in arrays_in(part)]
    return [] if result is None else [result]


class GPU(ABC):
    """A device that runs kernels: an op's `gpu` function gets it first, then the op's own arguments."""

    dtype = np.dtype(np.float16)
    is_gpu = True
    is_asynchronous = True
    device: str
    """As a person would name it."""
    arch: str = ""
    """As its compiler names it."""
    wave_size: int
    """Threads that run in step: 32 or 64."""
    num_cus: int
    """Multiprocessors or compute units."""
    has_wgmma = False
    """Whether its matrix cores multiply what lies in LDS, for four waves together: `include/tile_wgmma.hip`."""
    _counters: Any = None

    @cached_property
    def tuning(self) -> Choices:
        """What `choice` gives."""
        return Choices(self.arch)

    def choice(self, kernel: str, **shape: int | str) -> Values:
        """The block sizes, rows and splits that a kernel is launched with for a shape: see `forge.tuning`."""
        return self.tuning.of(kernel, shape)

    @property
    def has_blas(self) -> bool:
        """Whether `matmul` works here; without it products of any size are computed by forge's kernels."""
        return True

    def launch(self, op: _HasGPU, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run an op. Raises TypeError or ValueError where the arguments do not fit its declaration."""
        if op.run_gpu is None:
            raise UnsupportedError(f"op {op.name} has no kernel")
        op.check(args, dict(options))
        return op.run_gpu(self, *args, **options)

    def run(self, file: str, function: str, grid: int | tuple[int, ...], *args: Any, **defines: int | str) -> None:
        """Launch a kernel of `raw_kernels/<file>.hip` with so many blocks, in the variant of these -D values.

        Arrays go as pointers, None as a null pointer, numbers as the kernel's source declares them.
        """
        blocks = (grid,) if isinstance(grid, int) else grid
        if 0 not in blocks:
            entry = sources.entry(file, function, tuple(defines.items()))
            self._run(entry, (*blocks, *(1,) * (3 - len(blocks))), entry.bind(args))

    @abstractmethod
    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None: ...

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], bool]]:
        """Within it arrays that are made hold bytes of 255 (NaN) until written, between guard bands of numbers that are
        others for each array: what a kernel makes of one's, or copies of it, shows in another's.

        Gives a function that says whether the bands are whole. A device that checks each launch has nothing to add.
        """
        yield lambda: True

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array whose contents are undefined."""

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory for one op's own use: the next op may overwrite it."""
        return self.empty(shape, dtype)

    def counters(self, count: int) -> Any:
        """uint32 zeros (count,) for one launch's own use, which leaves them zeros: so the next one finds them."""
        if self._counters is None or len(self._counters) < count:
            self._counters = self.asarray(np.zeros(max(count, _MIN_COUNTERS), np.uint32))
        return self._counters[:count]

    @abstractmethod
    def asarray(self, array: Any, dtype: Any = None) -> Any:
        """A copy on the device."""

    @abstractmethod
    def read_seconds(self, size: int) -> float:
        """Time in which so many bytes are read at the rate of a large copy, measured now."""

    @abstractmethod
    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        """out[:, column:column + N] = x @ weight.T, or += with accumulate: f16 (M, K), f16 (N, K) -> f32 (M, ...).

        Through the vendor's BLAS, for products of many rows.
        """
