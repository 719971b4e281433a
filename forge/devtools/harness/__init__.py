"""The CPU harness: kernels of raw_kernels/ compiled by clang++ and run as fibers, at wave size 32 or 64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from forge import backend as backends
from forge.backend import sources
from forge.backend.gpu import GPU
from forge.devtools.harness.building import COMPILER as COMPILER
from forge.devtools.harness.building import TOOLS as TOOLS
from forge.devtools.harness.building import alone as alone
from forge.devtools.harness.building import build as build
from forge.devtools.harness.building import compiled as compiled
from forge.devtools.harness.building import fault_address
from forge.devtools.harness.building import launch as launch
from forge.devtools.harness.building import missing as missing
from forge.devtools.harness.memory import HarnessArray as HarnessArray
from forge.devtools.harness.memory import Memory
from forge.errors import DeviceError

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
TILES = {32: "TILE_MMA", 64: "TILE_MFMA"}
"""Whose matrix cores are played where nothing else is asked for, by the size of a wave."""
_TOUCHED = re.compile(r"^(thread \d+: (?:reads|writes to)) memory that is no array's")


class Harness(GPU):
    """A GPU on the CPU. What a kernel does that a GPU leaves undefined or hangs on is a DeviceError.

    `seed` 0 runs all in order; others shuffle blocks, waves and lanes. `flush`: subnormals are 0.

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
        array: HarnessArray = memory.bytes.view(dtype).reshape(shape).view(HarnessArray)
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

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
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
        arrays: dict[str, Any] = {
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
            raise DeviceError(f"{variant.name}: {function}: {_TOUCHED.sub(lambda m: _named(m, arrays), error)}")


def _named(match: re.Match[str], arrays: dict[str, Any]) -> str:
    """What a kernel touched, by the parameter whose fence it is."""
    address = fault_address()
    for name, array in arrays.items():
        if where := array.memory.where(address):
            return f"{match[1]} {where} {name} ({array.memory.size} bytes)"
    return match[0]


backends.register(HarnessArray, lambda array: array.device)
