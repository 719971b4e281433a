"""Matrix products through the vendor's BLAS: cuBLAS or hipBLAS, by CuPy's call of gemmEx."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from cupy_backends.cuda.libs import cublas

from forge.backend import probe
from forge.backend.cupy_driver import IS_HIP

_R_32F, _R_16F = 0, 2  # cudaDataType
_COMPUTE_32F = _R_32F if IS_HIP else 68  # CUBLAS_COMPUTE_32F, which ends the process in CuPy for ROCm 7
_NON_TRANSPOSED, _TRANSPOSED = 0, 1
_DEFAULT_ALGORITHM = -1
_FACTORS = np.array([0.0, 1.0], np.float32)
_ZERO, _ONE = _FACTORS.ctypes.data, _FACTORS.ctypes.data + 4


class Product(NamedTuple):
    """out (rows, outer of `stride`) = x (rows, inner) @ weight (outer, inner).T, or += with accumulate."""

    rows: int
    inner: int
    outer: int
    stride: int
    accumulate: bool

    def queue(self, x: int, weight: int, out: int) -> None:
        """Queue the product of the matrices at these addresses, float16 and of float32 results."""
        # Row-major out = x @ weight.T is column-major out.T = weight @ x.T; BLAS sees each array transposed.
        cublas.gemmEx(
            cp.cuda.device.get_cublas_handle(),
            *(_TRANSPOSED, _NON_TRANSPOSED, self.outer, self.rows, self.inner),
            *(_ONE, weight, _R_16F, self.inner, x, _R_16F, self.inner),
            *(_ONE if self.accumulate else _ZERO, out, _R_32F, self.stride, _COMPUTE_32F, _DEFAULT_ALGORITHM),
        )


def multiplies(device: str, name: str) -> bool:
    """Whether hipBLAS works on the GPU of this name, tried in a process that it may end. Else there is a warning."""
    trial = f"import sys; sys.path[:] = {sys.path!r}; from forge.backend import select"
    failure = probe.failure([sys.executable, "-c", f"{trial}; select('{name}').try_blas()"])
    if failure:
        warnings.warn(
            f"{device}: hipBLAS cannot multiply here ({failure}); prompts are computed by forge's own kernels, slower",
            stacklevel=3,
        )
    return not failure


def product_of(x: Any, weight: Any, out: Any, *, accumulate: bool) -> Product:
    """The product of x (M, K) and weight (N, K) in columns of out (M, at least N)."""
    rows, inner = x.shape
    return Product(rows, inner, weight.shape[0], out.shape[1], accumulate)
