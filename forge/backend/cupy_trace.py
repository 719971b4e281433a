"""A device on which an op is traced: which launches it makes, of which of its arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np
import numpy.typing as npt

from forge.backend import sources
from forge.backend.cupy_blas import product_of
from forge.backend.gpu import GPU

_SPAN = 1 << 40
"""Addresses of an array in a trace."""


def substituted(value: Any, substitute: Callable[[Any], Any]) -> Any:
    """The value with others for its arrays, in the order of their fields."""
    if isinstance(value, cp.ndarray):
        return substitute(value)
    if isinstance(value, tuple):
        return tuple(substituted(part, substitute) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: substituted(getattr(value, name), substitute) for name in names})
    return value


class Trace(GPU):
    """Stands for a device while an op is traced: its arrays have no memory, and launches are noted."""

    def __init__(self, device: GPU) -> None:
        self._traced = device
        vars(self).update((name, value) for name, value in vars(device).items() if not name.startswith("_"))
        self.sizes: list[int] = []
        """Bytes of each array."""
        self.launches: list[tuple[Any, ...]] = []
        """Either (entry, grid, arguments) or (product, x, weight, out)."""
        self.maps: dict[int, tuple[int, tuple[int, ...], int]] = {}
        """Which arrays are tensor maps, and of what: an address of the trace, a shape, slots."""
        self.scratch_index = self.counters_index = -1
        """Which array is what ops share; -1 for none."""

    @property
    def has_blas(self) -> bool:
        return self._traced.has_blas

    def like(self, array: Any) -> Any:
        """An array that stands for an argument."""
        if not array.flags.c_contiguous:
            raise TypeError("ops take C-contiguous arrays")
        return self.empty(array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        self.sizes.append(math.prod(shape) * np.dtype(dtype).itemsize)
        return self._at(len(self.sizes) - 1, shape, dtype)

    def _at(self, index: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        nowhere = cp.cuda.UnownedMemory((index + 1) * _SPAN, max(self.sizes[index], 1), self, 0)
        return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(nowhere, 0))

    def scratch(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        self.scratch_index = index = self._shared(self.scratch_index, math.prod(shape) * np.dtype(dtype).itemsize)
        return self._at(index, shape, dtype)

    def counters(self, count: int) -> Any:
        self.counters_index = index = self._shared(self.counters_index, 4 * count)
        return self._at(index, (count,), np.uint32)

    def map_of(self, address: int, shape: tuple[int, ...], slots: int) -> Any:
        self.maps[len(self.sizes)] = address, shape, slots
        return self.empty((16,), np.uint64)

    def _shared(self, index: int, size: int) -> int:
        if index < 0:
            index = len(self.sizes)
            self.sizes.append(0)
        self.sizes[index] = max(self.sizes[index], size)
        return index

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        self.launches.append((entry, grid, args))

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        if x.size and weight.size:
            product = product_of(x, weight, out, accumulate=accumulate)
            self.launches.append((product, x.data.ptr, weight.data.ptr, out.data.ptr + column * out.itemsize))

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any:
        raise NotImplementedError("an op uploads nothing")

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        raise NotImplementedError("an op reads nothing")

    def free_bytes(self) -> int:
        raise NotImplementedError("an op's launches do not depend on memory")


def place_of(address: int) -> tuple[int, int]:
    """Which array of a trace an address belongs to, and how far from its beginning."""
    index, offset = divmod(address, _SPAN)
    return index - 1, offset
