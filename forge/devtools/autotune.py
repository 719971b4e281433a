"""Finds the fastest values for a kernel on this GPU, among values with the same results as the table's choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from forge.backend.gpu import GPU
from forge.backend.graphs import arrays_in
from forge.config import Progress
from forge.devtools.verify import compare
from forge.devtools.workloads import Workload, workloads
from forge.errors import DeviceError, OutOfMemoryError
from forge.tuning import Choices, Key
from forge.tuning.spec import ShapeClass, Values
from forge.tuning.store import Measured
from forge.tuning.table import KERNELS

_MIN_GAIN = 0.03
"""Least gain, as a share of the time. A smaller one is noise, and not worth another order of sums."""
_ROTATED_BYTES = 400_000_000
"""Bytes of all inputs of a measured step, so that none is in a cache: AMD's largest cache has 256 MB."""
_MAX_CALLS = 200
"""Most calls of a measured step. Small inputs come from a cache in models, too."""
_ROUNDS = 9

Timer = Callable[[Any, Sequence[Callable[[], object]]], list[float]]
"""Gives the seconds of each of some captured steps on a device."""


def rotated(device: Any, steps: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each step. The steps take turns, so that whatever slows the device slows all of them."""
    rounds = [[float(device.seconds(step)) for step in steps] for _ in range(_ROUNDS)]
    return [median(times) for times in zip(*rounds, strict=True)]


def classes_of(shapes: Iterable[tuple[str, dict[str, int | str]]]) -> dict[Key, list[dict[str, int | str]]]:
    """The classes of these shapes that have more than one candidate, with the shapes of each."""
    found: dict[Key, list[dict[str, int | str]]] = {}
    for kernel, shape in shapes:
        shape_class = KERNELS[kernel].class_of(shape)
        if len(KERNELS[kernel].permitted(shape_class)) > 1:
            members = found.setdefault((kernel, shape_class), [])
            if shape not in members:
                members.append(shape)
    return found


def tune(
    device: GPU,
    classes: dict[Key, list[dict[str, int | str]]],
    timer: Timer,
    progress: Progress | None = None,
) -> Iterator[Measured]:
    """The best values for each class of shapes, as soon as they are known: the table's, or faster ones by 3%.

    Values whose results differ, or that the device refuses, are left out with a warning; so is a class for which memory
    does not suffice.
    """
    before = device.tuning
    device.tuning = Choices(device.arch)
    try:
        for done, ((kernel, shape_class), shapes) in enumerate(classes.items(), 1):
            try:
                works = [work for shape in shapes for work in workloads(device, kernel, shape)]
                yield _best(device, kernel, shape_class, works, timer)
            except OutOfMemoryError as error:
                warnings.warn(f"{kernel} {_text(KERNELS[kernel].named(shape_class))}: left out: {error}", stacklevel=2)
            if progress:
                progress("measuring classes of shapes", done, len(classes))
    finally:
        device.tuning = before


def _best(device: GPU, kernel: str, shape_class: ShapeClass, works: Sequence[Workload], timer: Timer) -> Measured:
    table, key = KERNELS[kernel], (kernel, shape_class)
    shape = table.named(shape_class)
    default = dict(table.row(device.tuning.architecture, shape))
    candidates = [default, *(values for values in table.permitted(shape_class) if values != default)]
    _compile(device, key, candidates, works)
    times = _times(device, key, candidates, works, timer)
    best, seconds = default, times[0]
    fastest = min(range(len(times)), key=times.__getitem__)
    if fastest and times[fastest] < (1 - _MIN_GAIN) * times[0]:
        # The fastest of many is also the luckiest: another measurement, of two candidates alone, decides.
        times = _times(device, key, [default, candidates[fastest]], works, timer)
        seconds = times[0]
        if times[1] < (1 - _MIN_GAIN) * times[0]:
            best, seconds = candidates[fastest], times[1]
    return Measured(kernel, shape, best, times[0] * 1e6, seconds * 1e6)


@contextmanager
def _trial(device: GPU, key: Key, values: Values) -> Iterator[None]:
    before = device.tuning
    device.tuning = Choices(device.arch, {key: values})
    try:
        yield
    finally:
        device.tuning = before


def _compile(device: Any, key: Key, candidates: Sequence[Values], works: Sequence[Workload]) -> None:
    """Compile all candidates in parallel. A candidate that does not compile gives its error in its own trial."""
    given = [work.make() for work in works]

    def launch_all() -> None:
        for values in candidates:
            with _trial(device, key, values):
                for work, args in zip(works, given, strict=True):
                    work.run(device, args)

    try:
        device.prepare(launch_all)
    except DeviceError:
        return


def _times(device: Any, key: Key, candidates: Sequence[Values], works: Sequence[Workload], timer: Timer) -> list[float]:
    """Seconds of all workloads together with each candidate, the default first; infinity for a candidate left out."""
    total = [0.0] * len(candidates)
    for work in works:
        inputs = [work.make()]
        size = sum(value.nbytes for _, value in work.op.flat(inputs[0]) if hasattr(value, "nbytes"))
        inputs += [work.make() for _ in range(min(-(-_ROTATED_BYTES // size), _MAX_CALLS) - 1)]
        steps: dict[int, Callable[[], object]] = {}
        wanted: list[Any] = []
        for n, values in enumerate(candidates):
            if total[n] == float("inf"):
                continue
            with _trial(device, key, values):
                try:
                    got, fault = _results(device, work, inputs[0])
                    wanted = wanted or got
                    fault = fault or _difference(work, got, wanted)
                    steps[n] = _recorded(device, work, inputs)
                except DeviceError as error:
                    fault = str(error)
            if fault and n == 0:
                raise DeviceError(f"{key[0]} fails with the values of forge's table: {fault}: run `forge verify`")
            if fault:
                warnings.warn(f"{key[0]} with {_text(values)} is left out: {fault}", stacklevel=2)
                total[n] = float("inf")
                steps.pop(n, None)
        for n, seconds in zip(steps, timer(device, list(steps.values())), strict=True):
            total[n] += seconds / len(inputs)
    return total


def _recorded(device: Any, work: Workload, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    replay: Callable[[], object]
    _, replay = device.capture(lambda: [work.run(device, args) for args in inputs], [], list)
    return replay


def _results(device: Any, work: Workload, args: tuple[Any, ...]) -> tuple[list[Any], str]:
    """The results of a workload in memory that held NaN, and the fault of a write outside an array, or ""."""
    with device.guarded() as whole:
        results = arrays_in(work.run(device, args))
        return [device.to_numpy(array) for array in results], "" if whole() else "it writes outside an array"


def _difference(work: Workload, got: Sequence[Any], wanted: Sequence[Any]) -> str:
    op = work.op
    share = max(compare(one, want, op.gpu_rtol, op.gpu_atol)[1] for one, want in zip(got, wanted, strict=True))
    return "" if share <= 1.0 else "its results differ from the default's"


def _text(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
