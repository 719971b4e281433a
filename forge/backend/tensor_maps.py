"""Tensor maps: what the bulk copy engine of NVIDIA's Hopper is told of an array, made by the driver.

Source: "Tensor Map Object Management" of the CUDA Driver API.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import DeviceError

_WORDS = 16
"""A CUtensorMap has so many uint64, and begins at a multiple of half of its size."""
_FLOAT16, _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _FILL_ZEROS = 6, 0, 3, 2, 0
_LINE = 64
"""Numbers of a row of a box: 128 bytes, as the matrix cores read them."""


_MAX_MAPS = 4096
"""Maps that are kept, the latest, of 512 bytes of the device's memory each: steps that are kept hold their own."""


class TensorMaps:
    """The maps of one device, of arrays at the same address made once."""

    def __init__(self, upload: Callable[[npt.NDArray[Any]], Any]) -> None:
        self._upload = upload
        self._made: dict[tuple[int, tuple[int, ...], int], Any] = {}

    def of(self, address: int, shape: tuple[int, ...], slots: int) -> Any:
        """The map of float16 (N, P, G, D) at an address, for boxes of `slots` positions; uint64 (16,) on the device."""
        key = address, shape, slots
        found = self._made.pop(key, None)
        if found is None:
            found = self._upload(encode(address, shape, slots))
            if len(self._made) >= _MAX_MAPS:
                del self._made[next(iter(self._made))]
        self._made[key] = found  # the latest last
        return found


def encode(address: int, shape: tuple[int, ...], slots: int) -> npt.NDArray[np.uint64]:
    """A CUtensorMap of float16 (N, P, G, D) as three dimensions D, G and N * P, for boxes of 64, 1 and `slots`.

    Raises DeviceError where the driver refuses.
    """
    pages, positions, heads, dim = shape
    memory = np.zeros(_WORDS + 8, np.uint64)
    skipped = -memory.ctypes.data % 64 // 8
    made = memory[skipped : skipped + _WORDS]
    sizes, strides = (
        (ctypes.c_uint64 * 3)(dim, heads, pages * positions),
        (ctypes.c_uint64 * 2)(2 * dim, 2 * dim * heads),
    )
    box, steps = (ctypes.c_uint32 * 3)(_LINE, 1, slots), (ctypes.c_uint32 * 3)(1, 1, 1)
    error = _driver().cuTensorMapEncodeTiled(
        *(ctypes.c_void_p(made.ctypes.data), _FLOAT16, 3, ctypes.c_void_p(address), sizes, strides, box, steps),
        *(_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _FILL_ZEROS),
    )
    if error:
        raise DeviceError(f"the driver makes no tensor map of {shape} for boxes of {slots}: CUresult {error}")
    return made


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
