"""Ops at the sizes of usual models: which launch a kernel, and what they take with forge's and with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from forge.backend import edits, sources
from forge.backend.gpu import GPU
from forge.devtools import autotune, verify
from forge.devtools.cases.case import Case
from forge.devtools.recorder import Recorder
from forge.devtools.workloads import shapes_of
from forge.devtools.workloads import workloads as workloads_at
from forge.errors import OutOfMemoryError
from forge.lab.report import Time
from forge.ops.op import Op
from forge.tuning.spec import Shape

Call = tuple[Op, Case]
Kernels = Mapping[tuple[str, str], str]
"""From kernel file and kernel to the name of the edit that is tried."""

_MAX_WORKLOADS = 4
_CLASSES = 2
"""Classes of shapes of a tuned kernel that are timed, the smallest."""
_LARGEST_CASES = 2
"""Cases that are timed of a kernel without workloads."""
_MOST = 1 << 20
"""A shape's number from which on it means any."""


def launched(kernels: Kernels, recorder: Recorder) -> dict[str, sources.Entry]:
    """Of these kernels, those that a recorder has noted."""
    return {entry.function: entry for entry in recorder.entries if is_of(entry, kernels)}


def is_of(entry: sources.Entry, kernels: Kernels) -> bool:
    """Whether an entry is one of these kernels, or of an edit of one."""
    edit = edits.of(entry.variant.file)
    return (edit.file if edit else entry.variant.file, entry.function) in kernels


def launching(calls: Sequence[Call], kernels: Kernels, recorder: Recorder) -> list[Call]:
    """Those that launch one of these kernels."""
    found = []
    for call in calls:
        if call[0].run_gpu:
            recorder.entries.clear()
            verify.launch([call], recorder)
            if launched(kernels, recorder):
                found.append(call)
    return found


def workloads(cases: Sequence[Call], kernels: Kernels, recorder: Recorder) -> list[Call]:
    """Calls to time, the smallest first: what `forge tune` measures of usual models, else the largest of the cases."""
    fresh = Recorder(recorder.arch, recorder.num_cus, has_wgmma=recorder.has_wgmma)
    verify.launch(cases, fresh)
    asked = {kernel for kernel, _ in fresh.tuning.asked}
    shapes = sorted(
        ((kernel, shape) for (kernel, _), each in shapes_of(recorder).items() if kernel in asked for shape in each[:1]),
        key=lambda pair: _volume(pair[1]),
    )
    found: list[Call] = []
    for kernel in dict.fromkeys(kernel for kernel, _ in shapes):
        own = [shape for name, shape in shapes if name == kernel][:_CLASSES]
        found += launching([call for shape in own for call in workloads_at(kernel, shape)], kernels, recorder)
    if found:
        return sorted(found[:_MAX_WORKLOADS], key=lambda call: _bytes(call, recorder))
    return sorted(cases, key=lambda call: _bytes(call, recorder))[-_LARGEST_CASES:]


def _volume(shape: Shape) -> int:
    return prod(min(value, _MOST) for value in shape.values() if isinstance(value, int))


def _arrays(op: Op, args: Sequence[Any]) -> list[Any]:
    return [value for _, value in op.flat(args) if hasattr(value, "nbytes")]


def _bytes(call: Call, recorder: Recorder) -> int:
    return sum(array.nbytes for array in _arrays(call[0], verify.inputs(*call, recorder)))


def times(device: GPU, calls: Sequence[Call], kernels: Kernels) -> tuple[list[Time], str]:
    """Each call's time with forge's kernels and with the new ones, which take turns; or why there is none.

    Inputs come in so many copies that no cache holds them. The new ones are in use behind it.
    """
    try:
        return [_time(device, op, case, kernels) for op, case in calls], ""
    except OutOfMemoryError as error:
        return [], f"the device has too little free memory: {error}"
    finally:
        edits.replace(kernels)


def _time(device: GPU, op: Op, case: Case, kernels: Kernels) -> Time:
    given = verify.inputs(op, case, device)
    size = sum(array.nbytes for array in _arrays(op, given))
    room = min(autotune.ROTATED_BYTES, device.free_bytes() // 4)
    copies = min(max(room // max(size, 1), 1), autotune.MAX_COPIES)
    inputs = [verify.on(op, given, device) for _ in range(copies)]

    def launch() -> list[Any]:
        return [device.launch(op, args, case.options) for args in inputs]

    steps, results = [], []
    for used in (dict.fromkeys(kernels), kernels):
        edits.replace(used)
        results = launch()[:1]
        steps.append(device.capture(launch, [], list)[1])
    old, new = autotune.rotated(device, steps)
    moved = size + sum(array.nbytes for array in _parts(results[0]))
    return Time(_label(op, case, given), old / copies * 1e6, new / copies * 1e6, moved)


def _parts(result: Any) -> list[Any]:
    """The arrays of an op's result: split-K partials are one."""
    values = result if isinstance(result, tuple) else (result,)
    return [value if hasattr(value, "nbytes") else value.parts for value in values if value is not None]


def _label(op: Op, case: Case, given: Sequence[Any]) -> str:
    """A call's name: the op, and its case or its first arrays' shapes."""
    shapes = ["x".join(map(str, array.shape)) for array in _arrays(op, given) if len(array.shape) > 1]
    return f"{op.name} {case.name or ' '.join(shapes[:2])}"


def entries(
    calls: Sequence[Call], kernels: Kernels, recorder: Recorder
) -> list[tuple[str, str, sources.Entry, sources.Entry]]:
    """Of each kernel that calls launch: its name, its variant as text, forge's entry and the new one."""
    pair = []
    for used in (dict.fromkeys(kernels), kernels):
        edits.replace(used)
        recorder.entries.clear()
        verify.launch(calls, recorder)
        pair.append(launched(kernels, recorder))
    old, new = pair
    return [(kernel, _text(old[kernel].variant), old[kernel], new[kernel]) for kernel in old]


def _text(variant: sources.Variant) -> str:
    return " ".join(f"{name}={value}" for name, value in variant.defines) or "its one variant"
