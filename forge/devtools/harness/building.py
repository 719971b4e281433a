"""Kernels compiled for the CPU, and the runtime that runs their threads as fibers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from threading import Lock

from forge._files import cache_dir
from forge.backend import compilers, sources
from forge.errors import DeviceError

HERE = Path(__file__).parent
TOOLS = os.environ.get("FORGE_HARNESS_PATH") or os.environ.get("PATH", os.defpath)
"""Where compilers are looked for: PATH, but for a process that is to find none there."""
COMPILER = next((path for name in ("clang++-19", "clang++") if (path := shutil.which(name, path=TOOLS))), None)
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-mf16c", "-w"]
_KERNEL_FLAGS = [
    *("-DFORGE_HARNESS", "-Wl,-z,now,-Bsymbolic"),
    *("-fsanitize=array-bounds", "-fno-sanitize-recover=array-bounds", "-fno-sanitize-link-runtime"),
    "-nostdlib",  # what C and C++ programs begin with takes longer to link than the kernel
]


def missing() -> str:
    """What this machine lacks to run kernels on the CPU, in one line; "" where nothing is missing."""
    if (machine := platform.machine()) != "x86_64" or sys.platform != "linux":
        return f"the CPU harness needs Linux on x86-64, not {sys.platform} on {machine}: use a machine with a GPU"
    return "" if COMPILER else "the CPU harness needs clang++: apt install clang-19, or use a machine with a GPU"


def _cache() -> Path:
    """Where compiled kernels are kept: $FORGE_HARNESS_CACHE, else a part of forge's cache directory."""
    chosen = os.environ.get("FORGE_HARNESS_CACHE")
    return Path(chosen) if chosen else cache_dir() / "harness"


def fault_address() -> int:
    """The address that the last faulty launch touched."""
    return int(_runtime().forge_fault_address())


def launch(
    module: ctypes.CDLL,
    function: str,
    grid: Sequence[int],
    threads: int,
    pointers: Sequence[int],
    *,
    wave: int,
    seed: int = 0,
    flush: bool = False,
    counters: tuple[int, int] = (0, 0),
) -> str:
    """Run a kernel of a compiled source on arguments at these addresses; what it did wrong, or "".

    counters: address and bytes of what blocks count in that hand on results.
    """
    with _one_at_a_time:
        error: bytes = _runtime().forge_launch(
            ctypes.cast(getattr(module, f"forge_call_{function}"), ctypes.c_void_p),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_uint32 * 3)(*grid),
            threads,
            wave,
            seed,
            module.forge_lds_start(),
            module.forge_lds_bytes(),
            flush,
            *counters,
        )
    return error.decode()


_one_at_a_time = Lock()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Processes and threads side by side want the same files: one at a time makes, or finds, this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        flock(lock, LOCK_EX)
        yield


@cache
def compiled(variant: sources.Variant, tile: str, wave: int, tile_flush: bool = False) -> ctypes.CDLL:
    """With the matrix cores `tile` of include/tile.hip, for waves of this size, where the kernel uses them."""
    library = build(variant, tile, wave, tile_flush)
    _runtime()  # whose functions it calls
    module = ctypes.CDLL(str(library))
    module.forge_lds_start.restype = ctypes.c_void_p
    module.forge_lds_bytes.restype = ctypes.c_uint64
    return module


def build(variant: sources.Variant, tile: str, wave: int, tile_flush: bool = False) -> Path:
    """A kernel as a shared library, kept in the cache by the hash of all that it is made from."""
    text = sources.source(variant.file)
    defines = [f"-DTILE={tile}", f"-DSTATIC_WAVE={wave}u", *["-DTILE_FLUSH"] * tile_flush]
    defines *= "tile_multiply" in text
    if why := missing():
        raise DeviceError(why)
    unit = text + _calls(variant)
    options = [*variant.options, *defines]
    flags = [*_FLAGS, *_KERNEL_FLAGS]
    key = hashlib.sha256("\0".join([unit, *options, *flags, str(COMPILER)]).encode()).hexdigest()[:32]
    library = _cache() / f"{key}.so"
    with alone(library):
        if not library.exists():
            kernel, scratch = library.with_suffix(".cpp"), library.with_suffix(".scratch")
            kernel.write_text(unit, encoding="utf-8")
            try:
                log = _compile([*flags, *options, str(kernel), "-o", str(scratch), "-lm", "-lc"])
            finally:
                kernel.unlink()
            if log is not None:
                raise compilers.refused(f"{variant.name} does not compile for the CPU harness", log, variant)
            scratch.replace(library)
    return library


@cache
def _runtime() -> ctypes.CDLL:
    """runtime.cpp, which all kernels call."""
    text = (HERE / "runtime.cpp").read_text()
    key = hashlib.sha256(f"{text}{_FLAGS}{COMPILER}".encode()).hexdigest()[:32]
    library = _cache() / f"runtime-{key}.so"
    with alone(library):
        if not library.exists():
            scratch = library.with_suffix(".scratch")
            log = _compile([*_FLAGS, "-O2", str(HERE / "runtime.cpp"), "-o", str(scratch)])
            if log is not None:
                raise DeviceError(f"{COMPILER} cannot compile the CPU harness: {log.strip()[:300]}")
            scratch.replace(library)
    runtime = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    runtime.forge_fault_address.restype = ctypes.c_uint64
    runtime.forge_launch.restype = ctypes.c_char_p
    runtime.forge_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64,
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64,
    ]  # fmt: skip
    return runtime


def _compile(arguments: list[str]) -> str | None:
    """Run the compiler; what it says where it fails, else None."""
    environment = {**os.environ, "PATH": TOOLS}
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, env=environment)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def _calls(variant: sources.Variant) -> str:
    """For each kernel a function that takes its arguments as an array of pointers; and the LDS section's bounds."""
    lines = [
        "",
        "__attribute__((used)) SHARED char forge_lds_anchor[16];",
        'extern "C" char __start_forge_lds[], __stop_forge_lds[];',
        'extern "C" void *forge_lds_start() { forge_lds_anchor[0] = 0; return __start_forge_lds; }',
        'extern "C" u64 forge_lds_bytes() { return __stop_forge_lds - __start_forge_lds; }',
    ]
    for name, (_, parameters) in sources.signatures(variant.file).items():
        passed = ", ".join(
            f"*({'const ' * p.is_const}{p.type} {'*' * p.is_pointer}*)a[{i}]" for i, p in enumerate(parameters)
        )
        lines.append(f'extern "C" void forge_call_{name}(void **a) {{ {name}({passed}); }}')
    return "\n".join(lines)
