"""`forge doctor`: what this machine has, what is wrong, and how to fix it."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from forge.cli import options, output
from forge.cli.about import about
from forge.errors import DeviceError, ForgeError

_LOW_MEMORY_BYTES = 10**9  # what the default model takes at most


class Finding(NamedTuple):
    """One thing looked at; `fix` says what to do where something is wrong."""

    what: str
    found: str
    fix: str = ""


def command(
    model: options.Model = options.DEFAULT_MODEL, device: options.Device = "auto", as_json: options.Json = False
) -> None:
    """Show what this machine has, and how to fix what is missing.

    A --device that is asked for and not there is a problem. Kernels that are prebuilt are counted for a model that is
    here, else in all.
    """
    found = [Finding(*map(output.printable, finding)) for finding in findings(device, model)]
    problems = [finding for finding in found if finding.fix]
    if as_json:
        output.write_json(
            {**about(_device(device)), "findings": [finding._asdict() for finding in found], "problems": len(problems)}
        )
    else:
        output.write_table("forge doctor", ("", ""), [(f.what, f.found) for f in found])
        for problem in problems:
            output.write(f"\n{problem.what}: {problem.fix}\n")
    if problems:
        raise typer.Exit(1)


def _device(device: str) -> str:
    from forge.backend import select

    try:
        return select(device).device
    except DeviceError:
        return "none"


def findings(device: str = "auto", model: str = options.DEFAULT_MODEL) -> Iterator[Finding]:
    """All findings. Raises ParameterError for a device that cannot be one."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    yield from _cpu()
    yield _memory()
    yield from _gpu(device, model)
    yield from _cache()
    yield _installer()


def _cpu() -> Iterator[Finding]:
    import numpy as np

    from forge.backend.threads import THREADS, cpu_time

    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    affinity, threads = len(os.sched_getaffinity(0)), THREADS.current
    cores = max(1, math.ceil(min(affinity, cpu_time())))  # a container may grant less than its CPUs
    found = f"{np.__version__}, BLAS {build.get('name')} {build.get('version')}"
    fix = ""
    if threads is not None:
        found += f", {output.count(threads, 'thread')}"
        if threads > cores:
            few = output.count(cores, "core")
            fix = f"BLAS runs {threads} threads on {few}, which is slow: set OPENBLAS_NUM_THREADS={cores}"
    yield Finding("CPU", f"{cores} of {output.count(os.cpu_count() or 1, 'core')} usable, {platform.machine()}")
    yield Finding("NumPy", found, fix)


def _memory() -> Finding:
    from forge.backend import select

    free = select("cpu").free_bytes()
    fix = "" if free >= _LOW_MEMORY_BYTES else "close other programs: smollm2 takes up to 1 GB"
    return Finding("memory", f"{output.num_bytes(free)} free", fix)


def _gpu(device: str = "auto", model: str = options.DEFAULT_MODEL) -> Iterator[Finding]:
    from forge.backend import cupy_fault, explain, rocm, select

    cupy, fault = rocm.installed_cupy(), cupy_fault()
    try:
        gpu = select(device)
        why = f"cpu; no GPU: {'CuPy cannot be imported' if fault else explain()}"
    except DeviceError as error:  # it was asked for
        gpu, why = None, "none: CuPy cannot be imported" if fault else f"none: {error}"
    if gpu is not None and gpu.is_gpu:
        yield from _facts(gpu, model)
        return
    path = next((path for path in _GPU_FILES if Path(path).exists()), "")
    kind, install, permit, system = _GPU_FILES.get(path, ("", "", "", ""))
    asked = {"hip": "AMD", "cuda": "NVIDIA"}.get(device.partition(":")[0], kind)
    driver_fix = cupy_fix = device_fix = ""
    if path and not os.access(path, os.R_OK | os.W_OK):
        driver_fix = f"{path} cannot be opened: {permit}"
    if fault:
        cupy_fix = f"it cannot be imported: {fault[1]}"
    elif path and cupy is None:
        cupy_fix = f"there is an {kind} GPU: {install}"
    elif path and asked == kind and not driver_fix:
        device_fix = f"{cupy} cannot use the {kind} GPU: install {system}; if that is CuPy for another, {install}"
    if gpu is None and not device_fix:
        device_fix = f"there is no {device} to be used here, and --device asked for it"
    yield Finding("device", why, device_fix)
    yield Finding("driver", path or f"none: there is no {' or '.join(_GPU_FILES)}", driver_fix)
    found = f"{cupy or 'not installed'}{f', cannot be imported: {fault[0]}' if fault else ''}"
    yield Finding("CuPy", found, cupy_fix)


def _facts(gpu: Any, model: str) -> Iterator[Finding]:
    """Facts about a GPU, with fixes for what is wrong."""
    fixes = {}
    try:
        facts = gpu.facts()
        if gpu.free_bytes() < _LOW_MEMORY_BYTES:
            fixes["device memory"] = "close what else uses the GPU, or use --device cpu: smollm2 takes up to 1 GB"
        if not gpu.has_blas:
            fixes["BLAS"] = (
                f"prompts are slower: install the newest ROCm, whose hipBLAS may have kernels for {gpu.arch}"
            )
    except DeviceError as error:
        yield Finding("device", gpu.device, f"{error}: restart or repair the GPU's driver")
        return
    for what, found in facts:
        if what == "kernel cache":
            state, fix = _writable(Path(found), "when the first kernel is compiled", "FORGE_CACHE")
            yield Finding(what, f"{found} ({state})", fix)
        else:
            yield Finding(what, found, fixes.get(what, ""))
    yield _tuning(gpu.arch)
    if gpu.arch.startswith("gfx"):
        yield _kernels(gpu.arch, model)


def _tuning(arch: str) -> Finding:
    """Origin of the choices of block sizes, rows and splits."""
    from forge.tuning import store

    stored = store.read(arch)
    if stored.fault:
        fix = "run `forge tune` to measure anew, or `forge tune --reset` to remove it"
        return Finding("tuning", f"{stored.path} {stored.fault}", fix)
    if not stored.choices:
        return Finding("tuning", "forge's table; `forge tune` measures on this GPU")
    return Finding("tuning", f"{len(stored.choices)} {stored.origin} ({stored.path})")


def _kernels(arch: str, model: str) -> Finding:
    """Sources of an AMD GPU's kernels: hipcc, a plain clang, prebuilt files."""
    from forge import hub
    from forge.backend import compilers, kernel_cache
    from forge.devtools.variants import model_variants

    compiler, stores = compilers.find_compiler(), kernel_cache.stores()
    suffix = f"; compiler: {compiler.path if compiler else 'none'}"
    try:
        wanted = model_variants(hub.resolve(model, download=False), arch)
    except ForgeError:  # the model is not here, or is none
        found = (kernel_cache.survey(store).get(arch) for store in stores)
        num_missing, text = 1, f"{sum(one[0]['valid'] for one in found if one)} prebuilt for {arch}{suffix}"
    else:
        num_missing = len(kernel_cache.missing(wanted, arch, stores))
        text = f"{len(wanted) - num_missing} of {len(wanted)} that {model} launches are prebuilt for {arch}{suffix}"
    if compiler or not num_missing:
        return Finding("kernels", text)
    fix = (
        f"install {compilers.COMPILERS}, or run `forge kernels build -m MODEL --arch {arch} --out DIR` on a machine "
        "that has one and set FORGE_KERNELS to a copy of DIR"
    )
    return Finding("kernels", text, fix)


_GPU_FILES = {
    "/dev/kfd": (
        "AMD",
        "pip install cupy-rocm-7-0",
        "sudo usermod -aG render,video $USER, and log in again",
        "ROCm 7, with its libraries, or restart its driver",
    ),
    "/dev/nvidia0": (
        "NVIDIA",
        "pip install 'cupy-cuda13x[ctk]'",
        "make it readable and writable for you",
        "a driver for CUDA 13, or restart it",
    ),
}
"""Files of a driver: whose GPU it is, how to install CuPy for it, how to be let in, and what else CuPy needs."""


def _cache() -> Iterator[Finding]:
    from forge import hub

    directory = hub.cache_dir()
    state, fix = _writable(directory, "when the first model is pulled", "FORGE_CACHE")
    yield Finding("cache", f"{directory} ({state})", fix)
    for name, model in hub.MODELS.items():
        held = "in the cache" if hub.cached_path(name) else f"not in the cache: forge pull {name}"
        yield Finding(name, f"{held} ({output.num_bytes(model.size)}, {model.licence})")


def _writable(directory: Path, when: str, variable: str) -> tuple[str, str]:
    """The state of a directory that is made when it is first used, and how to fix one that cannot be written to."""
    ancestor = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        return (
            f"{ancestor} cannot be written to",
            f"make {ancestor} writable, or set {variable} to a directory that is",
        )
    return "there" if directory == ancestor else f"made {when}", ""


def _installer() -> Finding:
    tools = [name for name, there in (("pip", importlib.util.find_spec("pip")), ("uv", shutil.which("uv"))) if there]
    fix = "" if tools else f"models cannot be pulled: run {sys.executable} -m ensurepip, or install uv"
    return Finding("fetches models with", tools[0] if tools else "nothing", fix)
