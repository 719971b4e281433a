"""The CPU harness: kernels of raw_kernels/ compiled by clang++ and run as fibers, at wave size 32 or 64."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from functools import cache
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from forge import backend as backends
from forge.backend import sources
from forge.backend.gpu import GPU

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("FORGE_HARNESS_CACHE", HERE.parents[1] / ".harness"))
TOOLS = os.environ.get("FORGE_HARNESS_PATH") or os.environ.get("PATH", os.defpath)
"""Where compilers are looked for: PATH, but for a process that is to find none there."""
COMPILER = next((path for name in ("clang++-19", "clang++") if (path := shutil.which(name, path=TOOLS))), None)
TILE_FAMILIES: dict[str, dict[str, Any]] = {
    "TILE_MMA": {"wave": 32},
    "TILE_MFMA": {"wave": 64},
    "TILE_MFMA, MI200": {"wave": 64, "tile_flush": True},
    "TILE_WMMA_11": {"wave": 32},
    "TILE_WMMA_12": {"wave": 32},
    "TILE_SCALAR": {"wave": 32},
    "TILE_SCALAR, GFX9": {"wave": 64},
}
"""What the harness plays for each family of matrix cores: its tiles, behind whose name may stand a variant."""
if COMPILER is None and os.environ.get("FORGE_REQUIRE_TOOLCHAIN"):
    raise RuntimeError("no clang++, and FORGE_REQUIRE_TOOLCHAIN is set: run scripts/install-toolchain")
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-mf16c", "-w"]
_KERNEL_FLAGS = [
    *("-DFORGE_HARNESS", "-Wl,-z,now,-Bsymbolic"),
    *("-fsanitize=array-bounds", "-fno-sanitize-recover=array-bounds", "-fno-sanitize-link-runtime"),
    "-nostdlib",  # what C and C++ programs begin with takes longer to link than the kernel
]
_FENCE = 16 * mmap.PAGESIZE
"""Bytes before and behind an array's pages that nobody may touch."""
_NOISE = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
_TOUCHED = re.compile(r"^(thread \d+: (?:reads|writes to)) memory that is no array's")

TILES = {32: "TILE_MMA", 64: "TILE_MFMA"}
"""Whose matrix cores are played where nothing else is asked for, by the size of a wave."""


class KernelFault(AssertionError):
    """What a kernel did that a GPU leaves undefined or hangs on."""


class Memory:
    """An array's bytes, which are 255 (NaN) until written, in pages between fences that nobody may touch.

    They end where the pages do; their begin is then at a multiple of 16 bytes where their size is one, and others are
    not read in such pieces. With `begins` they begin where the pages do.
    What else is in the pages are bands, of other numbers in each memory: a kernel that copies from one to the other, or
    computes with what it finds there, is found out.
    """

    _made = count()

    def __init__(self, size: int, *, begins: bool = False) -> None:
        self.size = size
        used = max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, used + 2 * _FENCE)
        self.pages = np.frombuffer(self._map, np.uint8, used, _FENCE)
        self.start = 0 if begins else used - size
        for fence in (-_FENCE, used):
            if _LIBC.mprotect(ctypes.c_void_p(self.pages.ctypes.data + fence), ctypes.c_size_t(_FENCE), 0):
                raise MemoryError("no fence: too many arrays for vm.max_map_count?")
        first = 4099 * next(self._made) % (len(_NOISE) - 3 * mmap.PAGESIZE)
        self._noise = _NOISE[first : first + self.start], _NOISE[first + self.start :][: used - size - self.start]
        for band, noise in zip(self._bands(), self._noise, strict=True):
            band[...] = noise
        self.bytes[...] = 0xFF

    @property
    def bytes(self) -> np.ndarray:
        return self.pages[self.start : self.start + self.size]

    def _bands(self) -> tuple[np.ndarray, np.ndarray]:
        return self.pages[: self.start], self.pages[self.start + self.size :]

    def is_whole(self) -> bool:
        return all(map(np.array_equal, self._bands(), self._noise))

    def where(self, address: int) -> str:
        """Where an address lies in the fences or the bands, or ""."""
        behind = address - (self.bytes.ctypes.data + self.size)
        if 0 <= behind < len(self.pages) + _FENCE:
            return f"{behind + 1} bytes behind"
        before = self.bytes.ctypes.data - address
        return f"{before} bytes before" if 0 < before < len(self.pages) + _FENCE else ""


_LIBC = ctypes.CDLL(None)


class HarnessArray(np.ndarray):
    """An array of the harness, between fences.

    It refuses what would launch a kernel of CuPy's on a GPU, which needs a compiler that AMD machines may lack.
    """

    device: Any = None
    memory: Any = None

    def __array_finalize__(self, of: Any) -> None:
        self.device = getattr(of, "device", None)
        self.memory = getattr(of, "memory", None)

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise TypeError("an array of a device is read by ops and copied: anything else is a kernel that is not forge's")

    __array_ufunc__ = __array_function__ = __setitem__ = _refuse
    astype = copy = fill = take = argmax = argmin = argsort = sort = cumsum = repeat = flatten = dot = _refuse

    def __getitem__(self, key: Any) -> Any:
        basic = (int, np.integer, slice, type(None), type(...))
        return super().__getitem__(key) if all(isinstance(k, basic) for k in _tuple(key)) else self._refuse()

    def reshape(self, *shape: Any) -> Any:
        return super().reshape(*shape) if self.flags.c_contiguous else self._refuse()


def _tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


class Harness(GPU):
    """A GPU on the CPU. `seed` 0 runs all in order; others shuffle blocks, waves and lanes. `flush`: subnormals are 0.

    Arrays end at a fence; with `begins` they begin behind one.
    `tile_flush`: float16 subnormals are 0 for the matrix cores alone, as on MI200.
    """

    device = "harness"
    begins = False

    def __init__(
        self,
        wave: int,
        seed: int = 0,
        cores: int = 4,
        flush: bool = False,
        tile: str = "",
        tile_flush: bool = False,
        groups: bool = False,
    ) -> None:
        self.wave_size, self.seed, self.num_cus, self.flush = wave, seed, cores, flush
        self.tile, self.tile_flush, self.has_wgmma = tile or TILES[wave], tile_flush, groups
        self.variants: set[sources.Variant] = set()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> HarnessArray:
        dtype = np.dtype(dtype)
        memory = Memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, begins=self.begins)
        array = memory.bytes.view(dtype).reshape(shape).view(HarnessArray)
        array.device, array.memory = self, memory
        return array

    def asarray(self, array: Any, dtype: Any = None) -> HarnessArray:
        values = np.asarray(array, dtype)
        copy = self.empty(values.shape, values.dtype)
        np.copyto(np.asarray(copy), values)
        return copy

    def tensor_map(self, array: Any, slots: int) -> Any:
        pages, positions, *rest = array.shape
        return self.asarray([array.ctypes.data, pages * positions, *rest, slots], np.uint64)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.array(array)

    def free_bytes(self) -> int:
        return 1 << 34

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        """What BLAS would do: float32 sums of float16 products."""
        y = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
        part = np.asarray(out)[:, column : column + weight.shape[0]]
        part[...] = part + y if accumulate else y

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        variant, function = entry.variant, entry.function
        self.variants.add(variant)
        arrays = {
            name: value
            for (name, *_), value in zip(entry.parameters, args, strict=True)
            if isinstance(value, np.ndarray)
        }
        # What a kernel takes lies in memory: an address as a number of 8 bytes, a number as itself.
        values = [
            np.array(value if isinstance(value, np.generic) else value.ctypes.data if value is not None else 0)
            for value in args
        ]
        pointers = [value.ctypes.data for value in values]
        counters = self._counters
        error = launch(
            compiled(variant, self.tile, self.wave_size, self.tile_flush),
            function,
            grid,
            entry.threads,
            pointers,
            wave=self.wave_size,
            seed=self.seed,
            flush=self.flush,
            counters=(0, 0) if counters is None else (counters.ctypes.data, counters.nbytes),
        )
        damaged = [name for name, array in arrays.items() if not array.memory.is_whole()]
        if damaged and not error:
            error = f"wrote outside an array: {', '.join(damaged)}"
        if not error and counters is not None and np.asarray(counters).any():
            error = "leaves counters that are not 0"
        if error:
            raise KernelFault(f"{variant.name}: {function}: {_TOUCHED.sub(lambda m: _named(m, arrays), error)}")


def _named(match: re.Match[str], arrays: dict[str, Any]) -> str:
    """What a kernel touched, by the parameter whose fence it is."""
    address = _runtime().forge_fault_address()
    for name, array in arrays.items():
        if where := array.memory.where(address):
            return f"{match[1]} {where} {name} ({array.memory.size} bytes)"
    return match[0]


backends.register(HarnessArray, lambda array: array.device)


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
    assert COMPILER, "no clang++: run scripts/install-toolchain"
    unit = text + _calls(variant)
    options = [*variant.options, *defines]
    flags = [*_FLAGS, *_KERNEL_FLAGS]
    key = hashlib.sha256("\0".join([unit, *options, *flags, COMPILER]).encode()).hexdigest()[:32]
    library = CACHE / f"{key}.so"
    with alone(library):
        if not library.exists():
            kernel, scratch = CACHE / f"{key}.cpp", CACHE / f"{key}.scratch"
            kernel.write_text(unit)
            _compile([*flags, *options, str(kernel), "-o", str(scratch), "-lm", "-lc"])
            scratch.replace(library)
            kernel.unlink()
    return library


@cache
def _runtime() -> ctypes.CDLL:
    """runtime.cpp, which all kernels call."""
    text = (HERE / "runtime.cpp").read_text()
    key = hashlib.sha256(f"{text}{_FLAGS}{COMPILER}".encode()).hexdigest()[:32]
    library = CACHE / f"runtime-{key}.so"
    with alone(library):
        if not library.exists():
            scratch = library.with_suffix(".scratch")
            _compile([*_FLAGS, "-O2", str(HERE / "runtime.cpp"), "-o", str(scratch)])
            scratch.replace(library)
    runtime = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    runtime.forge_fault_address.restype = ctypes.c_uint64
    runtime.forge_launch.restype = ctypes.c_char_p
    runtime.forge_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64,
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64,
    ]  # fmt: skip
    return runtime


def _compile(arguments: list[str]) -> None:
    environment = {**os.environ, "PATH": TOOLS}
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


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
