"""Arrays of the harness: memory between fences that nobody may touch, in bands that nobody may change."""

from __future__ import annotations

import ctypes
import mmap
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

_FENCE = 16 * mmap.PAGESIZE
"""Bytes before and behind an array's pages that nobody may touch."""
_NOISE = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
_LIBC = ctypes.CDLL(None)


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
    def bytes(self) -> npt.NDArray[Any]:
        return self.pages[self.start : self.start + self.size]

    def _bands(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
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


class HarnessArray(np.ndarray[Any, Any]):
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

    def reshape(self, *shape: Any) -> Any:  # type: ignore[override]
        return super().reshape(*shape) if self.flags.c_contiguous else self._refuse()


def _tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)
