"""Matrix products with weights, float or quantized."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.op import Array, Arrays, Case, op
from forge.quant import FORMATS, QuantTensor

# Measured on 2 cores with 2 MiB of L2 each, all products of a 135M model: 4 rows take 46 ms as matrix-vector products,
# 58 ms as weight @ x.T, 74 ms as x @ weight.T; 8 rows take 65, 58 and 71 ms; 1 row takes 22 ms.
_VECTOR_ROWS = 6
"""Up to this many rows: matrix-vector products, over a block of the weights that stays in the cache from row to row."""
_BLOCK_BYTES = 4 << 20
_SMALL_ROWS = 32
"""Up to this many rows: weight @ x.T, because BLAS repacks its left operand in smaller pieces."""


def _case(rows: int, inner: int, outer: int, *, bias: bool = False, residual: bool = False) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        return (
            normal(rows, inner),
            normal(outer, inner),
            normal(outer) if bias else None,
            normal(rows, outer) if residual else None,
        )

    extras = " bias" * bias + " residual" * residual
    return Case(f"M{rows} K{inner} N{outer}{extras}", make)


def _quantized(name: str) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return rng.standard_normal((2, 512)).astype(np.float32), QuantTensor.random(name, 3, 512, rng), None, None

    return Case(name, make)


def _vector_products(matrix: Array, x: Array) -> Array:
    if len(x) == 1:
        return np.dot(matrix, x[0])[None]
    y = np.empty((len(x), len(matrix)), x.dtype)
    step = max(_BLOCK_BYTES // matrix[0].nbytes, 1)
    for start in range(0, len(matrix), step):
        block = matrix[start : start + step]
        for row, out in zip(x, y[:, start : start + step], strict=True):
            np.dot(block, row, out=out)
    return y


def _linear_cpu(x: Array, weight: Any, bias: Array | None, residual: Array | None) -> Array:
    matrix = weight.dequantize() if isinstance(weight, QuantTensor) else weight  # (N, K)
    if len(x) <= _VECTOR_ROWS:
        y = _vector_products(matrix, x)
    elif len(x) <= _SMALL_ROWS:
        y = np.ascontiguousarray(np.dot(matrix, x.T).T)
    else:
        y = np.dot(x, matrix.T)
    if bias is not None:
        y += bias
    if residual is None:
        return y
    residual += y
    return residual


@op(
    "x:act[M,K] weight:weight[N,K] bias?:f32[N] &residual?:f32[M,N] -> y:f32[M,N]",
    cpu=_linear_cpu,
    rtol=1e-4,
    atol=1e-4,
    cases=[
        _case(1, 1, 1),
        _case(1, 64, 65, bias=True),
        _case(1, 576, 31, residual=True),
        *(_case(rows, 96, 33, bias=True, residual=True) for rows in (1, 2, 6, 7, 16, 32, 33, 70)),
        _case(3, 1024, 1500),
        *(_quantized(name) for name in FORMATS),
        Case(
            "by hand",
            lambda rng: (
                np.array([[1, 2]], np.float32),
                np.array([[3, 4], [5, 6]], np.float32),
                np.array([100, 200], np.float32),
                np.array([[1000, 2000]], np.float32),
            ),
            expected=([[1111, 2217]],),
        ),
    ],
)
def linear(x: Array, weight: Any, bias: Array | None, residual: Array | None) -> Array:
    """x @ weight.T + bias; with a residual, added to it in place and returned."""
    matrix = weight.dequantize() if isinstance(weight, QuantTensor) else weight  # (N, K)
    y = x @ matrix.T.astype(x.dtype)
    if bias is not None:
        y = y + bias
    if residual is None:
        return np.asarray(y)
    residual += y
    return residual
