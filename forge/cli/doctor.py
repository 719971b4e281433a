"""`forge doctor`: what this machine has, what is wrong, and the mend."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from forge.cli import options, output

_LOW_MEMORY_BYTES = 10**9  # what the default model takes at most


class Finding(NamedTuple):
    """One thing looked at; `mend` says what to do where something is wrong."""

    what: str
    found: str
    mend: str = ""


def command(as_json: options.Json = False) -> None:
    """Show what forge runs on here, and how to mend what keeps it from running well."""
    found = list(findings())
    problems = [finding for finding in found if finding.mend]
    if as_json:
        output.write_json({"findings": [finding._asdict() for finding in found], "problems": len(problems)})
    else:
        output.write_table("forge doctor", ("", ""), [(f.what, f.found) for f in found])
        for problem in problems:
            output.write(f"\n{problem.what}: {problem.mend}\n")
    if problems:
        raise typer.Exit(1)


def findings() -> Iterator[Finding]:
    """Everything that is looked at."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    yield from _cpu()
    yield _memory()
    yield from _gpu()
    yield from _cache()
    yield _installer()


def _cpu() -> Iterator[Finding]:
    import numpy as np

    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    cores, threads = _usable_cores(), _blas_threads()
    found = f"{np.__version__}, BLAS {build.get('name')} {build.get('version')}"
    mend = ""
    if threads is not None:
        found += f", {threads} threads"
        if threads > cores:
            mend = f"BLAS runs {threads} threads on {cores} cores, which is slow: set OPENBLAS_NUM_THREADS={cores}"
    yield Finding("CPU", f"{cores} of {os.cpu_count()} cores usable, {platform.machine()}")
    yield Finding("NumPy", found, mend)


def _usable_cores() -> int:
    """Cores that this process may use: its affinity mask, or a container's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # cgroup v2
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cores


def _blas_threads() -> int | None:
    """Threads of the OpenBLAS that NumPy has loaded; None where it is another library."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in sorted({line.split(maxsplit=5)[-1] for line in maps.splitlines() if "openblas" in line}):
        library = ctypes.CDLL(path)
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", ""):
                if function := getattr(library, f"{prefix}_get_num_threads{suffix}", None):
                    return int(function())
    return None


def _memory() -> Finding:
    from forge.backend import select

    free = select("cpu").free_bytes()
    mend = "" if free >= _LOW_MEMORY_BYTES else "close other programs: smollm2 takes up to 1 GB"
    return Finding("memory", f"{output.num_bytes(free)} free", mend)


def _gpu() -> Iterator[Finding]:
    from forge.backend import explain, select

    gpu = select("auto")
    if gpu.keeps_blocks:
        yield from (Finding(what, found) for what, found in gpu.facts())
        if gpu.arch.startswith("gfx"):
            yield _kernels(gpu.arch)
        return
    mend = next((mend for path, mend in _GPU_FILES.items() if Path(path).exists()), "")
    if mend and importlib.util.find_spec("cupy"):
        mend = f"CuPy is installed, so it is the driver, its permissions, or CuPy for another kind of GPU ({mend})"
    yield Finding("device", f"cpu; no GPU: {explain()}", mend)


def _kernels(arch: str) -> Finding:
    """What an AMD GPU's kernels come from: hipcc, a plain clang, files that were built before."""
    from forge.backend import code_objects, compilers
    from forge.variants import model_variants

    wanted, stores = model_variants(), code_objects.stores()
    prebuilt = sum(any(code_objects.check(store, v, arch).state == "valid" for store in stores) for v in wanted)
    compiler = compilers.find_compiler()
    found = f"{prebuilt} of {len(wanted)} prebuilt for {arch}; compiler: {compiler.path if compiler else 'none'}"
    if compiler or prebuilt == len(wanted):
        return Finding("kernels", found)
    mend = (
        f"install {compilers.COMPILERS}, or run `forge kernels build --arch {arch} --out DIR` on a machine that has "
        "one and set FORGE_KERNELS to a copy of DIR"
    )
    return Finding("kernels", found, mend)


_GPU_FILES = {
    "/dev/kfd": "there is an AMD GPU: pip install 'forge-llm[rocm]'",
    "/dev/nvidia0": "there is an NVIDIA GPU: pip install 'forge-llm[cuda]'",
}
"""Files of a driver, and what its GPU needs to be used."""


def _cache() -> Iterator[Finding]:
    from forge import hub

    directory = hub.cache_dir()
    ancestor = next(path for path in (directory, *directory.parents) if path.exists())
    state = "there" if directory == ancestor else "made when the first model is pulled"
    mend = ""
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        state = f"{ancestor} cannot be written to"
        mend = f"make {ancestor} writable, or set FORGE_CACHE to a directory that is"
    yield Finding("cache", f"{output.printable(str(directory))} ({state})", output.printable(mend))
    for name, model in hub.MODELS.items():
        held = "in the cache" if hub.is_cached(name) else f"not in the cache: forge pull {name}"
        yield Finding(name, f"{held} ({output.num_bytes(model.size)}, {model.licence})")


def _installer() -> Finding:
    tools = [name for name, there in (("pip", importlib.util.find_spec("pip")), ("uv", shutil.which("uv"))) if there]
    mend = "" if tools else f"models cannot be pulled: run {sys.executable} -m ensurepip, or install uv"
    return Finding("fetches models with", tools[0] if tools else "nothing", mend)
