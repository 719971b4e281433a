"""Memory that CuPy does not make by itself: between guard bands, pinned, or the host's for kernels to write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cupy as cp
import numpy as np
import numpy.typing as npt

_GUARD_BYTES = 1024  # keeps the alignment of what lies between


def host_visible(shape: tuple[int, ...], dtype: npt.DTypeLike, index: int) -> tuple[Any, npt.NDArray[Any]]:
    """Zeros in the host's memory: as an array of this GPU for kernels to write, and as one of NumPy's."""
    # Not of CuPy's pool: of memory with default flags alone HIP promises that the host sees what kernels
    # store, and the pool would give it away while the last steps of a dropped model still write to it.
    size = math.prod(shape)
    memory = cp.cuda.PinnedMemory(max(size * np.dtype(dtype).itemsize, 1))
    host = np.frombuffer(cp.cuda.PinnedMemoryPointer(memory, 0), dtype, size).reshape(shape)
    host.fill(0)
    address = cp.cuda.runtime.pointerGetAttributes(host.ctypes.data).devicePointer
    mapped = cp.cuda.UnownedMemory(address, host.nbytes, host, index)
    return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(mapped, 0)), host


@dataclass(frozen=True, slots=True)
class Guarded:
    """An array's memory with a band before and behind it."""

    memory: Any
    number: int
    """Number of the array. Bands of other arrays hold other values."""

    @classmethod
    def of_size(cls, size: int, number: int) -> Guarded:
        return cls(cp.empty(size + 2 * _GUARD_BYTES, np.uint8), number)

    @property
    def between(self) -> Any:
        """The array's own bytes."""
        return self.memory[_GUARD_BYTES:-_GUARD_BYTES]

    @property
    def bands(self) -> tuple[Any, Any]:
        return self.memory[:_GUARD_BYTES], self.memory[-_GUARD_BYTES:]

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """What the two bands hold."""
        return np.random.default_rng(self.number).integers(0, 256, (2, _GUARD_BYTES), np.uint8)


@dataclass(frozen=True, slots=True)
class Staged:
    """Host memory that the device copies from, and when it has."""

    array: npt.NDArray[Any]
    event: Any


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Host memory that the device can reach, of the GPU that is current."""
    size = math.prod(shape)
    memory = cp.cuda.alloc_pinned_memory(max(size * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype, size).reshape(shape)
