"""Matrix products with weights, float or quantized."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.matmul import MAX_ROWS, is_tiled, tile_product, tile_slices
from forge.ops.matvec import fits, vector_linear
from forge.ops.op import Array, Arrays, Case, op
from forge.ops.quant import FORMATS, Packed, QuantTensor, Stack

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


def _quantized(name: str, rows: int = 2, inner: int = 512, outer: int = 3, *, extras: bool = False) -> Case:
    """`extras`: a bias and a residual."""

    def make(rng: np.random.Generator) -> Arrays:
        # random weights are large, so x is kept small for the tolerance: it is rounded to 16 bits, or for several rows
        # the weights are to float16
        x = rng.standard_normal((rows, inner)).astype(np.float32) * (0.1 if rows == 1 else 0.01)
        weight = QuantTensor.random(name, outer, inner, rng)
        if not extras:
            return x, weight, None, None
        bias, residual = rng.standard_normal(outer), rng.standard_normal((rows, outer))
        return x, weight, bias.astype(np.float32), residual.astype(np.float32)

    return Case(f"{name} M{rows} K{inner} N{outer}{' bias residual' * extras}", make)


def _wide(name: str, rows: int, inner: int, outer: int = 302) -> Case:
    """Products near 1, of numbers that are far from float16's subnormals, which some GPUs take for zeros."""

    def make(rng: np.random.Generator) -> Arrays:
        weight = QuantTensor.random(name, outer, inner, rng, scale=0.001)
        x = rng.standard_normal((rows, inner)).astype(np.float32)
        return x / np.float32(weight.dequantize().std() * np.sqrt(inner)), weight, None, None

    return Case(f"{name} M{rows} K{inner} N{outer}", make)


def _stacked(rows: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        x, bias, residual = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 256), 14, (rows, 14)))
        x *= 1 if rows == 1 else np.float32(0.01)
        halves = rng.standard_normal((4, 256)).astype(np.float16)
        parts = QuantTensor.random("Q4_K", 5, 256, rng), QuantTensor.random("Q6_K", 5, 256, rng), halves
        return x, Stack(parts), bias, residual

    return Case(f"stack M{rows}", make)


def _sliced_case(case: Case) -> Case:
    return Case(case.name, lambda rng: case.make(rng)[:3])


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
    matrix = weight.dequantize() if isinstance(weight, QuantTensor | Stack) else weight  # (N, K)
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


_MIN_NORMAL = 2.0**-14
"""Of float16."""


def _flushed(numbers: Array) -> Array:
    """What is missing of each number where float16 subnormals are zeros; a kernel may round larger ones to some."""
    sizes = np.abs(numbers)
    return np.where(sizes < 2 * _MIN_NORMAL, np.minimum(sizes, _MIN_NORMAL), 0.0)


def flushed_products(x: Array, weight: Any, *_: Any) -> Array:
    """The most that x @ weight.T is off by where matrix cores take factors that are float16 subnormals for zeros.

    MI200's do. Source: MIOpen's documentation, "MI200 matrix fused multiply-add (MFMA) behavior specifics".
    """
    matrix = weight.dequantize() if isinstance(weight, QuantTensor | Stack) else weight
    return np.asarray(_flushed(x) @ np.abs(matrix).T + np.abs(x) @ _flushed(matrix).T)


_SCRATCH_WEIGHTS = 1 << 26
"""Quantized weights that are converted to float16 at a time for BLAS."""


def _linear_gpu(device: GPU, x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    rows = x.shape[0]
    y = device.empty((rows, weight.shape[0]), np.float32) if residual is None else residual
    column = 0
    for part in weight.parts if isinstance(weight, Stack) else (weight,):
        outer = part.shape[0]
        part_bias = None if bias is None else bias[column : column + outer]
        if rows <= MAX_ROWS or not device.has_blas:
            for start in range(0, rows, MAX_ROWS):
                some = slice(start, start + MAX_ROWS)
                _few_rows(device, x[some], part, part_bias, y[some], column, residual is not None)
        else:
            _many_rows(device, x, part, y, column, residual is not None)
            if part_bias is not None:
                device.run("linear", "add_bias", (-(-outer // 256), rows), part_bias, y, outer, y.shape[1], column)
        column += outer
    return y


def _few_rows(device: GPU, x: Any, weight: Any, bias: Any, y: Any, column: int, accumulate: bool) -> None:
    rows, (outer, inner) = len(x), weight.shape
    if rows == 1 and fits(weight):
        vector_linear(device, x, weight, bias, y[0, column : column + outer], accumulate=accumulate)
    elif is_tiled(weight):
        tile_product(device, x, weight, bias, y, column, accumulate=accumulate)
    else:
        sizes = (inner, outer, y.shape[1], column, int(accumulate))
        device.run("linear", "linear", (outer, rows), x, weight, bias, y, *sizes)


def _many_rows(device: GPU, x: Any, weight: Any, y: Any, column: int, accumulate: bool) -> None:
    if not isinstance(weight, Packed):
        device.matmul(x, weight, y, column, accumulate=accumulate)
        return
    outer, inner = weight.shape
    step = max(_SCRATCH_WEIGHTS // inner, 1)
    for first in range(0, outer, step):
        count = min(step, outer - first)
        scratch = device.scratch((count, inner), device.dtype)
        grid = -(-count * inner // (weight.unit * 128))
        device.run(
            "dequantize", "dequantize", grid, *weight.planes, scratch, first, count, inner, FORMAT=int(weight.type)
        )
        device.matmul(x, scratch, y, column + first, accumulate=accumulate)


@op(
    "x:act[M,K] weight:weight[N,K] bias?:f32[N] &residual?:f32[M,N] -> y:f32[M,N]",
    cpu=_linear_cpu,
    gpu=_linear_gpu,
    rtol=1e-4,
    atol=1e-4,
    gpu_slack=flushed_products,
    cases=[
        _case(1, 1, 1),
        _case(1, 64, 65, bias=True),
        _case(1, 576, 31, residual=True),
        *(_case(rows, 96, 33, bias=True, residual=True) for rows in (1, 2, 6, 7, 16, 32, 33, 70)),
        _case(3, 1024, 1500),
        *(
            _case(rows, inner, 3)
            for rows, inner in ((3, 40), (4, 72), (5, 1000), (8, 1001), (9, 8), (15, 31), (17, 1001))
        ),
        *(_quantized(name) for name in FORMATS),
        *(_quantized(name, rows=65, inner=256, outer=17) for name in FORMATS),
        *(_quantized(name, inner=576) for name in ("Q4_1", "Q5_0", "Q8_0")),
        *(_quantized(name, 3, 640, 1) for name in ("Q4_0", "Q5_1", "IQ4_NL")),
        *(_quantized(name, 1, 32, 1) for name in ("Q4_0", "Q8_0")),
        *(_quantized("Q4_K", rows, 1280, 7) for rows in (1, 3, 4, 5, 8, 9, 16)),
        _quantized("Q6_K", 1, 768, 5),
        *(_quantized(name, rows, 512, 37, extras=True) for name in ("Q4_0", "Q6_K") for rows in (1, 7, 40)),
        *(_quantized(name, 1, inner, 2) for name in ("Q2_K", "Q8_0") for inner in (4096, 4352, 16_384, 16_640)),
        # As wide as models are: turns of a team that end with a row, several outputs for each.
        *(_wide(name, 1, 2048) for name in FORMATS),
        *(_wide(name, 1, inner) for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K") for inner in (1024, 8192)),
        *(_wide(name, 5, 1024) for name in FORMATS),
        _case(1, 4096, 302),
        _case(9, 2048, 302),
        _case(40, 2552, 17, bias=True, residual=True),  # in more slices than are added at a time
        _stacked(1),
        _stacked(5),
        _stacked(65),
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
    matrix = weight.dequantize() if isinstance(weight, QuantTensor | Stack) else weight  # (N, K)
    y = x @ matrix.T.astype(x.dtype)
    if bias is not None:
        y = y + bias
    if residual is None:
        return np.asarray(y)
    residual += y
    return residual


def _linear_sliced_gpu(device: GPU, x: Any, weight: Any, bias: Any) -> Any:
    if 1 < len(x) <= MAX_ROWS and is_tiled(weight):
        return tile_slices(device, x, weight, bias)
    return _linear_gpu(device, x, weight, bias, None)


@op(
    "x:act[M,K] weight:weight[N,K] bias?:f32[N] -> y:f32[M,N]",
    cpu=lambda x, weight, bias: _linear_cpu(x, weight, bias, None),
    gpu=_linear_sliced_gpu,
    rtol=1e-4,
    atol=1e-4,
    gpu_slack=flushed_products,
    cases=[
        _sliced_case(_case(1, 64, 5)),
        *(
            _sliced_case(_case(rows, inner, 33, bias=True))
            for rows, inner in ((2, 96), (16, 1000), (33, 2056), (64, 520))
        ),
        *(_sliced_case(_quantized(name, rows, 1024, 9)) for name in ("Q4_0", "Q4_K", "Q6_K") for rows in (5, 40)),
        _sliced_case(_case(5, 63, 3)),
        _sliced_case(_case(65, 64, 3)),
        _sliced_case(_stacked(5)),
    ],
)
def linear_sliced(x: Array, weight: Any, bias: Array | None) -> Array:
    """x @ weight.T + bias, for an op that takes it as `Slices`, which it may be on a GPU."""
    return np.asarray(linear.reference(x, weight, bias, None))
