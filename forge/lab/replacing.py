"""Kernels replaced while the process runs, after a trial in another process."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge import backend as backends
from forge.backend import edits, kernel_cache, probe
from forge.backend.gpu import GPU
from forge.errors import DeviceError, ParameterError
from forge.lab import kernels
from forge.lab.report import Report

_SECONDS = 600
"""How long a trial may take: all cases of a kernel with many variants take a few minutes on the CPU."""
_store: tempfile.TemporaryDirectory[str] | None = None


def source(name: str) -> str:
    """The present text of a kernel ("rmsnorm"), or of a kernel file ("norm.hip").

    Raises ParameterError for a name that there is not, with the nearest ones.
    """
    return kernels.text(kernels.find(name))


def replace(name: str, source: str, *, device: str = "auto", first_line: int = 1) -> Report:
    """Replace a kernel, or a kernel file, from the next launch of this process on; what was verified and measured.

    The source is compiled and tried in another process: over the cases of all ops that launch the kernel, against their
    float64 references, then timed beside forge's own kernel. Where anything fails, the kernel in use stays.

    Raises ParameterError where the source declares other parameters, does not compile (`cell:3` is its third line), or
    computes something else, with the case and its numbers; DeviceError where there is nothing to try it on.

    name: As for `source`. device: As for `forge.load`; without a GPU the CPU harness runs the kernel, which needs
    clang++. first_line: The number of the first line for the author.
    """
    place = kernels.find(name)
    edit = kernels.edited(place, source, first_line)
    report = _tried(place, edit, device)
    edits.replace(dict.fromkeys(place.kernels, edits.add(edit)))
    return report


def restore(name: str | None = None) -> list[str]:
    """forge's own kernel again, or file of kernels, or all, from the next launch on. Returns what was replaced."""
    chosen = edits.replaced() if name is None else kernels.find(name).kernels
    found = [kernel for kernel in chosen if kernel in edits.replaced()]
    edits.replace(dict.fromkeys(found))
    return [kernel for _, kernel in found]


@contextmanager
def replaced(name: str, source: str, *, device: str = "auto") -> Iterator[Report]:
    """As `replace`, within the context. Behind it the kernel is the one that was in use before."""
    place = kernels.find(name)
    before: Mapping[Any, str | None] = {kernel: edits.replaced().get(kernel) for kernel in place.kernels}
    report = replace(name, source, device=device)
    try:
        yield report
    finally:
        edits.replace(before)


def _tried(place: kernels.Place, edit: edits.Edit, device: str) -> Report:
    """The report of a process that tries an edit: a kernel that faults or does not end takes that process alone."""
    global _store
    if _store is None:
        _store = tempfile.TemporaryDirectory(prefix="forge-lab-")
        kernel_cache.edit_store = Path(_store.name)
    used = backends.select(device)
    loaded = [variant.defines for variant in used.loaded if variant.file == place.file] if isinstance(used, GPU) else []
    others = {kernel: name for kernel, name in edits.replaced().items() if kernel not in place.kernels}
    job = {
        "edits": [asdict(found) for found in map(edits.of, {*others.values()}) if found],
        "in_use": [[*kernel, name] for kernel, name in others.items()],
        "new": asdict(edit),
        "kernels": place.kernels,
        "device": device,
        "loaded": loaded,
        "store": _store.name,
    }
    with tempfile.TemporaryDirectory(prefix="forge-lab-") as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        code = f"import sys; sys.path[:] = {sys.path!r}; from forge.lab.trial import main; main({folder!r})"
        ended = probe.run([sys.executable, "-c", code], _SECONDS)
        result = Path(folder, "result.json")
        if ended.how or not result.exists():
            last = [line for line in ended.output.splitlines() if line.strip()][-1:]
            how = ": ".join([ended.how or "no result", *last])
            raise DeviceError(f"the trial of {place.name} ended early, the kernel in use stays: {how}")
        found = json.loads(result.read_text())
    if "error" in found:
        kind = ParameterError if found["is_refused"] else DeviceError
        error = kind(found["error"], parameter="source" if found["is_refused"] else None)
        for note in found["notes"]:
            error.add_note(note)
        raise error
    return Report.made(found["report"])
