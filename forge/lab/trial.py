"""The process that tries an edit: it compiles, verifies, times and takes apart a kernel that may do anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge import backend as backends
from forge.backend import code_objects, compilers, edits, kernel_cache, sources
from forge.backend.gpu import GPU
from forge.config import Progress
from forge.devtools import harness, verify
from forge.devtools.cases import all_cases
from forge.devtools.recorder import Recorder
from forge.devtools.verify import CaseError
from forge.errors import DeviceError, ForgeError, ParameterError
from forge.lab import timing
from forge.lab.report import Report, Resources, Time
from forge.lab.timing import Call, Kernels, is_of, launching

_NOT_TIMED = "the CPU harness ran it, whose time says nothing about a GPU; a model on NumPy launches no kernel"
_SHOWN_FAULTS = 3
_SHOWN_TARGETS = ("gfx942", "gfx1100")
"""AMD GPUs whose registers are shown on a machine without one."""


def main(folder: str) -> None:
    """Read job.json, which `forge.lab` writes, and leave result.json."""
    job = json.loads(Path(folder, "job.json").read_text())
    kernel_cache.edit_store = Path(job["store"])
    for edit in job["edits"]:
        edits.add(edits.Edit(**edit))
    new = edits.add(edits.Edit(**job["new"]))
    edits.replace({(file, kernel): name for file, kernel, name in job["in_use"]})
    kernels: Kernels = dict.fromkeys([(file, kernel) for file, kernel in job["kernels"]], new)
    loaded = [sources.Variant(new, tuple((name, value) for name, value in defines)) for defines in job["loaded"]]
    result: dict[str, Any]
    try:
        result = {"report": asdict(_report(kernels, job["device"], loaded))}
    except ForgeError as error:
        notes = list(getattr(error, "__notes__", ()))
        result = {"error": str(error), "is_refused": isinstance(error, ParameterError), "notes": notes}
    Path(folder, "result.json").write_text(json.dumps(result))


def _report(kernels: Kernels, name: str, loaded: Sequence[sources.Variant]) -> Report:
    device = backends.select(name)
    for devices in [[device]] if isinstance(device, GPU) else _on_cpu():
        recorder = _recorder(devices[0])
        calls = launching(all_cases(), kernels, recorder)
        if calls:
            break
    else:
        raise DeviceError(
            f"no case of an op launches {_named(kernels)} on {devices[0].device}: it cannot be verified here"
        )
    if not isinstance(device, GPU):
        calls = _few(calls, kernels, recorder)
    edits.replace(kernels)
    for each in devices:
        _compile(each, _variants(calls, kernels, _recorder(each)))
    if loaded:
        devices[0].build(loaded)
    errors = [error for each in devices for error in _verified(calls, each, kernels)]
    worst = max(errors, key=lambda error: error.share)
    waves = " and ".join(str(each.wave_size) for each in devices)
    where = devices[0].device if isinstance(device, GPU) else f"the CPU harness, in waves of {waves}"
    times: list[Time] = []
    resources: list[Resources] = []
    not_timed, not_shown = _NOT_TIMED, ""
    workloads = timing.workloads(calls, kernels, recorder)
    if isinstance(device, GPU):
        times, not_timed = timing.times(device, workloads, kernels)
        resources = [
            Resources(kernel, device.device, variant, device.resources(old), device.resources(new))
            for kernel, variant, old, new in timing.entries(workloads[-1:], kernels, recorder)
        ]
    else:
        resources, not_shown = _of_amd(workloads[-1:], kernels)
    shown = f"{worst.op} {worst.case}".strip()
    return Report(
        _named(kernels),
        where,
        len(errors) // len(devices),
        shown,
        worst.share,
        worst.max_abs,
        times,
        not_timed,
        resources,
        not_shown,
    )


class _Harness(harness.Harness):
    """The CPU harness, whose kernels are compiled ahead."""

    def build(self, variants: Any, progress: Progress | None = None) -> None:
        def compile(variant: sources.Variant) -> None:
            harness.compiled(variant, self.tile, self.wave_size)

        compilers.compile_all(compile, variants, progress)


def _on_cpu() -> list[list[GPU]]:
    """GPUs on the CPU: waves of both sizes, in another order, arrays with a fence at another side; then Hopper, for
    kernels that nothing else launches."""
    if why := harness.missing():
        raise DeviceError(f"there is no GPU to try a kernel on, and {why}")
    first, second = _Harness(32), _Harness(64, seed=1)
    first.begins = True
    return [[first, second], [_Harness(32, groups=True)]]


def _recorder(device: GPU) -> Recorder:
    """What notes the launches of a device."""
    recorder = Recorder(device.arch, device.num_cus, has_wgmma=device.has_wgmma)
    recorder.wave_size = device.wave_size
    return recorder


def _few(calls: Sequence[Call], kernels: Kernels, recorder: Recorder) -> list[Call]:
    """Calls that launch nothing else, and of the others those that launch further variants: a CPU computes all kernels
    of a call, and compiles them. All calls, where none is alone."""
    found, seen = [], set[sources.Variant]()
    noted = [_launches([call], kernels, recorder) for call in calls]
    if all(others for _, others in noted):
        return list(calls)
    for call, (own, others) in sorted(zip(calls, noted, strict=True), key=lambda pair: pair[1][1] > 0):
        if not (others and seen.issuperset(own)):
            found.append(call)
        seen.update(own)
    return found


def _launches(calls: Sequence[Call], kernels: Kernels, recorder: Recorder) -> tuple[list[sources.Variant], int]:
    """The variants of these kernels that calls launch, and how many other entries."""
    recorder.entries.clear()
    verify.launch(calls, recorder)
    own = [entry.variant for entry in recorder.entries if is_of(entry, kernels)]
    return own, len(recorder.entries) - len(own)


def _variants(calls: Sequence[Call], kernels: Kernels, recorder: Recorder) -> list[sources.Variant]:
    """All variants of these kernels that calls launch."""
    return list(dict.fromkeys(_launches(calls, kernels, recorder)[0]))


def _compile(device: GPU, variants: list[sources.Variant]) -> None:
    """The first alone: what is wrong with it is wrong with most, and is said once."""
    with _refusing():
        device.build(variants[:1])
        device.build(variants[1:])


@contextmanager
def _refusing() -> Iterator[None]:
    """What does not compile is the source's fault."""
    try:
        yield
    except DeviceError as error:
        refused = ParameterError(f"source: {error}", parameter="source")
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from None


def _verified(calls: Sequence[Call], device: GPU, kernels: Kernels) -> list[CaseError]:
    """The error of each case, all of them passed. Raises ParameterError with the numbers of the first that are not."""
    errors: list[CaseError] = []
    failed = []
    for op, case in calls:
        try:
            error = verify.verify_case(op, case, device)
        except DeviceError as fault:
            error = CaseError(op.name, case.name, float("inf"), float("inf"), str(fault))
        errors.append(error)
        if not error.passed:
            failed.append(error)
        if len(failed) == _SHOWN_FAULTS:
            break
    if failed:
        said = [_said(error) for error in failed]
        rest = "" if len(failed) < _SHOWN_FAULTS else "; other cases were not tried"
        message = f"source: {_named(kernels)} is wrong in {said[0]}{rest}"
        refused = ParameterError(message, parameter="source", hint="the kernel in use stays")
        for each in said[1:]:
            refused.add_note(f"and in {each}")
        raise refused
    return errors


def _said(error: CaseError) -> str:
    shown = f"case {error.case!r} of {error.op}"
    if error.fault:
        return f"{shown}: {error.fault}"
    return f"{shown}: off by {error.max_abs:.3g}, {error.share:.3g} times what is allowed"


def _of_amd(workloads: Sequence[Call], kernels: Kernels) -> tuple[list[Resources], str]:
    """What kernels take of AMD GPUs, by a compiler without a GPU; or why that is not known."""
    compiler = compilers.find_compiler()
    if compiler is None:
        return [], f"there is no compiler for AMD GPUs: install {compilers.COMPILERS}"
    found = []
    for target in _SHOWN_TARGETS:
        for kernel, variant, old, new in timing.entries(workloads, kernels, Recorder(target)):
            try:
                own = compilers.compile_variant(old.variant, target, compiler)
            except DeviceError as error:  # the linker is missing, say
                return [], str(error)
            with _refusing():
                edited = compilers.compile_variant(new.variant, target, compiler)
            taken = [code_objects.resources(code)[kernel] for code in (own, edited)]
            found.append(Resources(kernel, target, variant, *taken))
    return found, "" if found else "it is launched on NVIDIA's Hopper alone, and there is no GPU"


def _named(kernels: Kernels) -> str:
    if len(kernels) == 1:
        return next(iter(kernels))[1]
    return f"{next(iter(kernels))[0]}.hip"
