"""libhipblas: the product that forge calls, computed by NumPy; codes and types as in `hipblas.h` of hipBLAS 3."""

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import c_int, c_void_p
from itertools import count
from typing import Any

from virtual_rocm.calls import Failure, provided
from virtual_rocm.runtime import DEVICE, GFX, Stream

NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED, INTERNAL_ERROR, INVALID_ENUM = 1, 3, 7, 6, 10  # hipblasStatus_t
_OP_N, _OP_T, _COMPUTE_32F, _DEFAULT_ALGORITHM = 111, 112, 2, 160
_R_32F, _R_16F = 0, 2  # hipDataType
_handles: dict[int, int | None] = {}  # the stream of each
_next_handle = count(0x100, 0x10)


def hipblasCreate(pointer: c_void_p) -> c_int:
    if os.environ.get("VIRTUAL_ROCM_BLAS") == "none":  # what rocBLAS does on a GPU that it has no kernels for
        print(
            "\nrocBLAS error: Cannot read /opt/rocm/lib/rocblas/library/TensileLibrary.dat: No such file or directory "
            f"for GPU arch : {GFX}",
            file=sys.stderr,
            flush=True,
        )
        os.abort()
    handle = next(_next_handle)
    _handles[handle] = None
    ctypes.memmove(pointer, ctypes.byref(c_void_p(handle)), 8)


def hipblasDestroy(handle: c_void_p) -> c_int:
    _handles.pop(handle or 0, None)


def hipblasSetStream(handle: c_void_p, stream: c_void_p) -> c_int:
    if handle not in _handles:
        raise Failure(NOT_INITIALIZED)
    _handles[handle] = stream


def hipblasGetStream(handle: c_void_p, pointer: c_void_p) -> c_int:
    ctypes.memmove(pointer, ctypes.byref(c_void_p(_handles[handle or 0])), 8)


def hipblasGemmEx(
    handle: c_void_p,
    op_a: c_int,
    op_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: c_void_p,
    a: c_void_p,
    type_a: c_int,
    stride_a: c_int,
    b: c_void_p,
    type_b: c_int,
    stride_b: c_int,
    beta: c_void_p,
    c: c_void_p,
    type_c: c_int,
    stride_c: c_int,
    compute: c_int,
    algorithm: c_int,
) -> c_int:
    """C = alpha op(A) op(B) + beta C of column-major matrices; of float16 into float32, summed in float32."""
    import numpy as np

    if handle not in _handles:
        raise Failure(NOT_INITIALIZED)
    if {op_a, op_b} - {_OP_N, _OP_T}:
        raise Failure(INVALID_ENUM)
    if min(m, n, k) < 0 or stride_a < (m if op_a == _OP_N else k) or stride_b < (k if op_b == _OP_N else n):
        raise Failure(INVALID_VALUE)
    if stride_c < m:
        raise Failure(INVALID_VALUE)
    if (type_a, type_b, type_c, compute, algorithm) != (_R_16F, _R_16F, _R_32F, _COMPUTE_32F, _DEFAULT_ALGORITHM):
        raise Failure(NOT_SUPPORTED)
    scale, kept = (ctypes.c_float.from_address(pointer).value for pointer in (alpha, beta))

    def matrix(address: int, rows: int, columns: int, stride: int, dtype: Any) -> Any:
        size = ((columns - 1) * stride + rows) * np.dtype(dtype).itemsize
        held = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
        return np.lib.stride_tricks.as_strided(held, (rows, columns), (held.itemsize, stride * held.itemsize))

    def multiply() -> str:
        if not m * n:
            return ""
        out = matrix(c, m, n, stride_c, np.float32)
        product = np.zeros((m, n), np.float32)
        if k:
            left = matrix(a, *((m, k) if op_a == _OP_N else (k, m)), stride_a, np.float16).astype(np.float32)
            right = matrix(b, *((k, n) if op_b == _OP_N else (n, k)), stride_b, np.float16).astype(np.float32)
            product = (left if op_a == _OP_N else left.T) @ (right if op_b == _OP_N else right.T)
        out[...] = scale * product + (kept * out if kept else 0)
        return ""

    DEVICE.launches.append(("hipBLAS", "hipblasGemmEx"))
    DEVICE.get(_handles[handle], Stream).add(lambda: DEVICE.run(multiply, [a, b, c]))


def functions() -> dict[str, Callable[..., Any]]:
    """All of them, by name."""
    return provided([value for name, value in globals().items() if name.startswith("hipblas")])
