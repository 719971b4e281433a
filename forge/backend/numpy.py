"""The NumPy backend: host memory, float32 throughout, matrix products through NumPy's BLAS."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import host
from forge.backend.base import Backend, Launchable
from forge.backend.threads import THREADS
from forge.errors import OutOfMemoryError


class NumpyBackend(Backend):
    """Runs an op's NumPy function on NumPy arrays."""

    device = f"cpu ({os.cpu_count()} core{'' if os.cpu_count() == 1 else 's'}, NumPy {np.__version__})"
    dtype = np.dtype(np.float32)
    is_gpu = False
    is_asynchronous = False

    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        return op.run_cpu(*args, **options)

    def active(self) -> AbstractContextManager[None]:
        """Without NumPy's warnings: weights may be NaN or too large, and ids and scores say what became of them."""
        THREADS.adjust()
        return np.errstate(all="ignore")

    def asarray(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        return np.asarray(array, dtype)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory that is taken as it is written, in small pages.

        np.empty asks for huge pages: a KV cache of which little is used would take 2 MiB for each array touched.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OutOfMemoryError(
                f"no address space for {size / 1e9:.2f} GB of KV cache ({error.strerror})",
                parameter="context",
                hint="use a smaller context",
            ) from None
        with suppress(AttributeError, OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return np.ndarray(shape, dtype, memory)

    def to_numpy(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def free_bytes(self) -> int:
        """Memory of the host that can be taken without swapping, within the limits of this process."""
        return host.free_bytes()


NUMPY = NumpyBackend()
