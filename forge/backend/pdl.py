"""Launches that CuPy has no call for: of kernels that may be started while what was launched before still runs.

Such a kernel calls `grid_dependency_sync` (include/prelude.hip) where it needs what earlier ones stored, and reads
weights until then. NVIDIA's driver does this from compute capability 9.0 on: "programmatic dependent launch" in the
CUDA C++ Programming Guide. On AMD a kernel starts where the one before it has ended.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: the value is a union of 64 bytes, of which this one is the first int."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


class Packed:
    """Arguments of a launch as the driver takes them."""

    def __init__(self, args: Sequence[Any]) -> None:
        """args: Arrays of CuPy (or None) and NumPy scalars, which the caller keeps alive."""
        values = np.zeros(max(len(args), 1), np.uint64)
        for place, value in enumerate(args):
            if isinstance(value, np.generic):
                values[place : place + 1].view(value.dtype)[0] = value
            else:
                values[place] = 0 if value is None else value.data.ptr
        places = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
        self._kept = values, places
        self.address: int = places.ctypes.data
        """Of the addresses of the arguments."""


class DependentLaunch:
    """A launch that may start before the launches before it have ended. Its arguments are packed once."""

    def __init__(
        self, function: int, grid: Sequence[int], threads: int, args: Sequence[Any], lds_bytes: int = 0
    ) -> None:
        """
        function: A CUfunction.
        args: As of `Packed`.
        lds_bytes: LDS of a block beside what the kernel declares.
        """
        self._function = ctypes.c_void_p(function)
        self._packed = Packed(args)
        self._pointers = ctypes.c_void_p(self._packed.address)
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        grid_3, block = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1)
        self._config = _Config(grid_3, block, lds_bytes, None, ctypes.pointer(self._attribute), 1)

    def __call__(self, stream: int) -> int:
        """Queue the launch; the driver's CUresult, 0 for success."""
        self._config.stream = stream
        launch = _driver().cuLaunchKernelEx
        return int(launch(ctypes.byref(self._config), self._function, self._pointers, None))
