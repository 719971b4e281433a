"""Finds the fastest values for a kernel on this GPU, among values with the same results as the table's choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

from forge.config import Progress
from forge.devtools import verify
from forge.devtools.cases.case import Case
from forge.devtools.workloads import workloads
from forge.errors import DeviceError, OutOfMemoryError
from forge.ops.op import Array, Op
from forge.tuning import Choices, Key
from forge.tuning.spec import Shape, Values
from forge.tuning.store import Measured
from forge.tuning.table import KERNELS

_MIN_GAIN = 0.03
"""Least gain, as a share of the time. A smaller one is noise, and not worth another order of sums."""
ROTATED_BYTES = 400_000_000
"""Bytes of all inputs of a measured step, so that none is in a cache: AMD's largest cache has 256 MB."""
MAX_COPIES = 200
"""Most copies of the inputs. Small inputs come from a cache in models, too."""
_ROUNDS = 9

Step = Callable[[], object]


def rotated(device: Any, steps: Sequence[Step]) -> list[float]:
    """Median seconds of each captured step. They take turns, so that whatever slows the device slows all of them."""
    rounds = [[float(device.seconds(step)) for step in steps] for _ in range(_ROUNDS)]
    return [median(times) for times in zip(*rounds, strict=True)]


def tune(device: Any, classes: Mapping[Key, Sequence[Shape]], progress: Progress | None = None) -> Iterator[Measured]:
    """The best values for each class of shapes, as soon as they are known: the table's, or faster ones by 3%.

    Values whose results differ, or that the device refuses, are left out with a warning; so is a class for which memory
    does not suffice.
    """
    before = device.tuning
    try:
        for done, (key, shapes) in enumerate(classes.items(), 1):
            try:
                yield _best(device, key, [case for shape in shapes for case in workloads(key[0], shape)])
            except OutOfMemoryError as error:
                named = KERNELS[key[0]].named(key[1])
                warnings.warn(f"{key[0]} {_text(named)}: left out: {error}", stacklevel=2)
            if progress:
                progress("measuring classes of shapes", done, len(classes))
    finally:
        device.tuning = before


def _best(device: Any, key: Key, cases: Sequence[tuple[Op, Case]]) -> Measured:
    kernel, shape = key[0], KERNELS[key[0]].named(key[1])
    default = KERNELS[kernel].row(device.arch, shape)
    candidates = [default, *(values for values in KERNELS[kernel].permitted(shape) if values != default)]
    steps, copies = _steps(device, key, candidates, cases)
    times = dict(zip(steps, rotated(device, list(steps.values())), strict=True))
    best = min(times, key=times.__getitem__)
    if times[best] < (1 - _MIN_GAIN) * times[0]:
        # The fastest of many is also the luckiest: another measurement, of two candidates alone, decides.
        times = dict(zip((0, best), rotated(device, [steps[0], steps[best]]), strict=True))
    if times[best] >= (1 - _MIN_GAIN) * times[0]:
        best = 0
    return Measured(kernel, shape, candidates[best], times[0] / copies * 1e6, times[best] / copies * 1e6)


def _steps(
    device: Any, key: Key, candidates: Sequence[Values], cases: Sequence[tuple[Op, Case]]
) -> tuple[dict[int, Step], int]:
    """Captured steps by the number of their candidate, 0 being the default, and how often each runs the cases."""
    calls = [(op, case, verify.inputs(op, case, device)) for op, case in cases]
    arrays = [value for op, _, args in calls for _, value in op.flat(args) if hasattr(value, "nbytes")]
    copies = min(-(-ROTATED_BYTES // sum(array.nbytes for array in arrays)), MAX_COPIES)
    inputs = [verify.on(op, args, device) for _ in range(copies) for op, _, args in calls]

    def launch(times: int) -> list[Any]:
        pairs = zip(calls * times, inputs, strict=False)
        return [device.launch(op, args, case.options) for (op, case, _), args in pairs]

    def launch_all() -> None:
        for values in candidates:
            device.tuning = Choices(device.arch, {key: values})
            launch(1)

    with suppress(DeviceError):  # a candidate that does not compile gives its error again when it is tried alone
        device.prepare(launch_all)
    steps: dict[int, Step] = {}
    wanted: list[list[Array]] = []
    for n, values in enumerate(candidates):
        device.tuning = Choices(device.arch, {key: values})
        try:
            with device.guarded() as whole:  # new arrays hold NaN until they are written
                got = [verify.computed(*call, device) for call in calls]
                fault = "" if whole() else "it writes outside an array"
            wanted = wanted or got
            for (op, _), results, others in zip(cases, got, wanted, strict=True):
                pairs = zip(results, others, strict=True)
                if any(verify.compare(*pair, op.gpu_rtol, op.gpu_atol)[1] > 1.0 for pair in pairs):
                    fault = fault or "its results differ from the default's"
            _, steps[n] = device.capture(lambda: launch(copies), [], list)
        except DeviceError as error:
            fault = str(error)
        if fault and n == 0:
            raise DeviceError(f"{key[0]} fails with the values of forge's table: {fault}: run `forge verify`")
        if fault:
            warnings.warn(f"{key[0]} with {_text(values)} is left out: {fault}", stacklevel=2)
            steps.pop(n, None)
    return steps, copies


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
