"""A GPU that runs nothing: it notes which kernels ops launch, and its arrays are shapes and dtypes without memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import amd, register, sources
from forge.backend.gpu import GPU

MAX_CUS = 512
"""Compute units of a recorder: more than any GPU has, so that products are split where some GPU splits them."""


class Recorded(np.ndarray[Any, Any]):
    """An array of a recorder: what was placed there, or zeros that nobody writes."""

    device: Any = None

    def __array_finalize__(self, of: Any) -> None:
        self.device = getattr(of, "device", None)


register(Recorded, lambda array: array.device)


class Recorder(GPU):
    """A GPU by its name, on which launches are noted. It needs neither a GPU nor memory.

    arch: As a compiler names a GPU, such as gfx1100. The choices of `forge.tuning` and the size of waves depend on it.
    num_cus: Compute units.
    has_wgmma: None of AMD's GPUs has it.
    """

    def __init__(self, arch: str = "", num_cus: int = MAX_CUS, *, has_wgmma: bool = False) -> None:
        self.arch, self.num_cus, self.has_wgmma = arch, num_cus, has_wgmma
        self.device = self.name = f"recorder of {arch}"
        self.wave_size = amd.wave_size(arch)
        self.entries: dict[sources.Entry, None] = {}

    @property
    def variants(self) -> list[sources.Variant]:
        """The variants that were launched, each once, by name."""
        return sorted({entry.variant for entry in self.entries}, key=lambda variant: variant.name)

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        self.entries[entry] = None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = np.ndarray(shape, dtype, _zeros(max(size - 1, 0).bit_length())).view(Recorded)
        array.device = self
        return array

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Any:
        """The values as they are: what a batch says of its sequences is read again."""
        found = np.asarray(array, dtype, order="C").view(Recorded)
        found.device = self
        return found

    def tensor_map(self, array: Any, slots: int) -> Any:
        return self.empty((16,), np.uint64)

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        return np.asarray(array)

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        """The vendor's BLAS has kernels of its own."""

    def upload(self, array: Any, values: npt.NDArray[Any], *, is_pinned: bool = False) -> None:
        pass

    def host_visible(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, npt.NDArray[Any]]:
        return self.empty(shape, dtype), np.zeros(shape, dtype)

    def prepare(self, run: Callable[[], None], progress: object = None) -> None:
        """Compiles nothing: the launches of `run` are noted."""
        run()

    def free_bytes(self) -> int:
        """More than any model needs."""
        return 1 << 50


@cache
def _zeros(bits: int) -> mmap.mmap:
    """2 ** bits bytes of address space that can only be read, which takes no memory."""
    return mmap.mmap(-1, 1 << bits, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
