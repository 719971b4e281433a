"""Memory that CuPy does not make by itself: between guard bands, pinned, or the host's for kernels to write."""

from __future__ import annotations

import math
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import cupy as cp
import numpy as np
import numpy.typing as npt

_GUARD_BYTES = 1024  # keeps the alignment of what lies between
_COPIED_BYTES = 1 << 28
_COPIES = 8


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


def lasting() -> AbstractContextManager[object]:
    """New arrays within the context are in CuPy's own memory, where no step that is queued again writes to them."""
    allocator: AbstractContextManager[object] = cp.cuda.using_allocator(cp.get_default_memory_pool().malloc)
    return allocator


class Guarded:
    """An array's memory between two bands, which hold other values than the bands of arrays with other numbers."""

    def __init__(self, size: int, number: int) -> None:
        self.memory = cp.empty(size + 2 * _GUARD_BYTES, np.uint8)
        self.values = np.random.default_rng(number).integers(0, 256, (2, _GUARD_BYTES), np.uint8)
        self.bands = self.memory[:_GUARD_BYTES], self.memory[-_GUARD_BYTES:]
        self.between = self.memory[_GUARD_BYTES:-_GUARD_BYTES]
        """The array's own bytes."""


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Host memory that the device can reach, of the GPU that is current."""
    size = math.prod(shape)
    memory = cp.cuda.alloc_pinned_memory(max(size * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype, size).reshape(shape)


class Staging:
    """Copies from the host by way of pinned memory, which stays alive until they have run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._staged: deque[tuple[Any, Any]] = deque()
        """Pinned arrays that copies read, and the events behind the copies."""

    def upload(self, array: Any, values: npt.NDArray[Any], *, is_pinned: bool) -> None:
        """Overwrite an array of the GPU that is current. is_pinned: As of `Backend.upload`."""
        if is_pinned:
            array.data.copy_from_host_async(values.ctypes.data, values.nbytes, self._stream)
            return
        staged, event = pinned(values.shape, values.dtype), cp.cuda.Event(block=False, disable_timing=True)
        np.copyto(staged, values)
        array.data.copy_from_host_async(staged.ctypes.data, values.nbytes, self._stream)
        event.record(self._stream)
        self._staged.append((staged, event))
        while len(self._staged) > 1 and self._staged[0][1].done:
            self._staged.popleft()

    def clear(self) -> None:
        """Let go of the pinned memory. All copies must have run."""
        self._staged.clear()


class Copies:
    """Large copies on the device, to measure their rate."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._source = stream, cp.empty(_COPIED_BYTES, np.uint8)
        self._target = cp.empty_like(self._source)
        self.nbytes = 2 * _COPIES * _COPIED_BYTES
        """What they read and write."""

    def queue(self) -> None:
        for _ in range(_COPIES):
            self._target.data.copy_from_device_async(self._source.data, _COPIED_BYTES, self._stream)
