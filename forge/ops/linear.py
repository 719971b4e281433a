"""The product with a matrix of weights, float or quantized: what models spend their time on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops import fixed, matmul, matvec
from forge.ops.activation import act_and_mul
from forge.ops.norm import Normed, norm, ordered
from forge.ops.op import Array, op
from forge.ops.ordered import ORDERS, empty
from forge.ops.quant import Packed, QuantTensor, Stack, parts_of
from forge.tuning.table import MATMUL_ROWS

FIXED = ("fixed", "fixed_allowed", "fixed_glu")
"""Values of split_k with which a row's result does not depend on the rows beside it."""


@op(
    "operand:act[M,K]|Normed weight:weight[N,K] bias?:f32[N] &residual?:f32[M,N] glu=none|silu|gelu "
    "split_k=never|allowed|fixed|fixed_allowed|fixed_glu -> y:f32[M,N] if glu=none else y:act[M,N/2]",
    rtol=1e-4,
    atol=1e-4,
)
def linear(operand: Any, weight: Any, bias: Array | None, residual: Array | None, *, glu: str, split_k: str) -> Array:
    """operand @ weight.T + bias.

    operand: An array (M, K), rows that are normalized first, or `Ordered`, as a product with a gate leaves it.
    residual: The product is added to it in place, and it is returned. A product with glu has none.
    glu: The product's first half is a gate, and the result is activation(gate) * up (arXiv:2002.05202).
    split_k: "allowed": The result may be `Partials`, which the reader sums; with glu `Ordered`, for the product with a
    quantized matrix. "fixed": A row's result has the same bits whatever rows stand beside it. "fixed_allowed": Both.
    "fixed_glu": The sums have the same bits as those that a product with glu and "fixed" makes its result of.
    """
    _check(residual, glu)
    x = norm.reference(operand, out="act") if isinstance(operand, Normed) else operand
    y = x @ _matrix(weight).T.astype(x.dtype)
    if bias is not None:
        y = y + bias
    if glu != "none":
        return np.asarray(act_and_mul.reference(y, activation=glu))
    if residual is None:
        return np.asarray(y)
    residual += y
    return residual


def _matrix(weight: Any) -> Array:
    """(N, K) float."""
    return np.asarray(weight.dequantize() if isinstance(weight, QuantTensor | Stack) else weight)


def _check(residual: Any, glu: str) -> None:
    if residual is not None and glu != "none":
        raise ValueError("linear: a product with glu has no residual")


# Measured on 2 cores with 2 MiB of L2 each, all products of a 135M model: 4 rows take 46 ms as matrix-vector products,
# 58 ms as weight @ x.T, 74 ms as x @ weight.T; 8 rows take 65, 58 and 71 ms; 1 row takes 22 ms.
_VECTOR_ROWS = 6
"""Up to this many rows: matrix-vector products, over a block of the weights that stays in the cache from row to row."""
_BLOCK_BYTES = 4 << 20
_SMALL_ROWS = 32
"""Up to this many rows: weight @ x.T, because BLAS repacks its left operand in smaller pieces."""


@linear.cpu
def _linear_cpu(
    operand: Any, weight: Any, bias: Array | None, residual: Array | None, *, glu: str, split_k: str
) -> Array:
    _check(residual, glu)
    x: Array = norm.run_cpu(operand, out="act") if isinstance(operand, Normed) else operand
    matrix = _matrix(weight)
    if split_k in FIXED:
        y = fixed.product(matrix, x)
    elif len(x) == 1:
        y = np.dot(matrix, x[0])[None]
    elif len(x) <= _VECTOR_ROWS:
        y = _vector_products(matrix, x)
    elif len(x) <= _SMALL_ROWS:
        y = np.ascontiguousarray(np.dot(matrix, x.T).T)
    else:
        y = np.dot(x, matrix.T)
    if bias is not None:
        y += bias
    if glu != "none":
        return np.asarray(act_and_mul.run_cpu(y, activation=glu))
    if residual is None:
        return y
    residual += y
    return residual


def _vector_products(matrix: Array, x: Array) -> Array:
    y = np.empty((len(x), len(matrix)), x.dtype)
    step = max(_BLOCK_BYTES // matrix[0].nbytes, 1)
    for start in range(0, len(matrix), step):
        block = matrix[start : start + step]
        for row, out in zip(x, y[:, start : start + step], strict=True):
            np.dot(block, row, out=out)
    return y


@linear.gpu
def _linear_gpu(device: GPU, operand: Any, weight: Any, bias: Any, residual: Any, *, glu: str, split_k: str) -> Any:
    """Choose the kernels, and what is fused into them.

    - One row: GEMV. It computes an RMS norm of the operand, and behind it the gated activation.
    - 2 to 256 rows: matrix cores. They compute the gated activation, or partials for the reader to sum.
    - More rows: BLAS, or blocks of rows on the matrix cores, as the tuning table says.
    - Any number of rows with a fixed split_k: matrix cores, split as the matrix and the device say.

    Norms and activations that are not fused are launches before and after the product.
    """
    _check(residual, glu)
    rows, is_stack, parts = operand.shape[0], isinstance(weight, Stack), parts_of(weight, bias)
    is_fixed = split_k in FIXED
    norm_inside = (
        isinstance(operand, Normed)
        and (operand.is_rms and operand.pending is None and rows == 1 and not is_fixed)
        and all(matvec.supports(part, normed=True) for _, part, _ in parts)
        and not (is_stack and glu != "none")
    )
    on_matrix_cores = (
        (is_fixed or rows > 1)
        and matmul.supports(weight)
        and not any(_by_blas(device, rows, part, is_fixed) for _, part, _ in parts)
    )
    if isinstance(operand, Normed) and not norm_inside:
        how = {"is_glu": glu != "none" and not is_stack, "is_fixed": is_fixed}
        orders = matmul.orders_of(device, rows, weight, **how) if on_matrix_cores else ()
        operand = ordered(device, operand, orders) if orders else device.launch(norm, (operand,), {"out": "act"})
    if glu != "none" and not is_stack and (norm_inside or on_matrix_cores):
        shape = rows, weight.shape[0] // 2
        if norm_inside:
            y = device.empty(shape, device.dtype)
            matvec.matvec(device, operand, weight, bias, y[0], glu=glu)
            return y
        if split_k == "allowed" and matmul.leaves_orders(device, operand, weight, is_fixed=is_fixed):
            y, gated = empty(device, shape, ORDERS)
        else:
            y = gated = device.empty(shape, device.dtype)
        matmul.matmul(device, operand, weight, bias, y, glu=glu, is_fixed=is_fixed)
        return gated
    leaves_partials = glu == "none" and residual is None and split_k in ("allowed", "fixed_allowed")
    if leaves_partials and on_matrix_cores and not (is_fixed and is_stack):
        return matmul.split_k(device, operand, weight, bias, is_fixed=is_fixed)
    y = device.empty((rows, weight.shape[0]), np.float32) if residual is None else residual
    is_normed = isinstance(operand, Normed)
    are_beside = (len(parts) > 1 and rows == 1 and not is_fixed) and all(
        isinstance(part, Packed) and matvec.supports(part, normed=is_normed) for _, part, _ in parts
    )
    for place, (column, part, part_bias) in enumerate(parts):
        order = min(place + 1, 2) if are_beside else 0
        how = {"accumulate": residual is not None, "is_fixed": is_fixed}
        how["sums_as_glu"] = split_k == "fixed_glu" and not is_stack  # of a stack they are no other sums
        _product(device, operand, part, part_bias, y, column, part=order, **how)
    return y if glu == "none" else device.launch(act_and_mul, (y,), {"activation": glu})


def _product(
    device: GPU,
    operand: Any,
    weight: Any,
    bias: Any,
    y: Any,
    column: int,
    *,
    accumulate: bool,
    is_fixed: bool,
    sums_as_glu: bool,
    part: int,
) -> None:
    """y[:, column:column + N] = operand @ weight.T + bias, or += with accumulate."""
    rows, (outer, inner) = operand.shape[0], weight.shape
    if _by_blas(device, rows, weight, is_fixed):
        _many_rows(device, operand, weight, y, column, accumulate=accumulate)
        if bias is not None:
            device.run("linear", "add_bias", (-(-outer // 256), rows), bias, y, outer, y.shape[1], column)
    elif rows == 1 and not is_fixed and matvec.supports(weight, normed=isinstance(operand, Normed)):
        matvec.matvec(device, operand, weight, bias, y[0, column : column + outer], accumulate=accumulate, part=part)
    elif matmul.supports(weight):
        matmul.matmul(
            device,
            operand,
            weight,
            bias,
            y,
            column,
            accumulate=accumulate,
            is_fixed=is_fixed,
            sums_as_glu=sums_as_glu,
        )
    else:
        sizes = (inner, outer, y.shape[1], column, int(accumulate))
        device.run("linear", "linear", (outer, rows), operand, weight, bias, y, *sizes)


def _by_blas(device: GPU, rows: int, weight: Any, is_fixed: bool) -> bool:
    """Whether the vendor's BLAS computes a product."""
    if rows <= MATMUL_ROWS[-1] or is_fixed or not device.has_blas:
        return False
    if not matmul.supports(weight):
        return True
    if rows <= matmul.MAX_ROWS:
        return False
    most = 1 << (rows - 1).bit_length()  # the choice is one of few classes, which end at such numbers
    format = weight.type.name if isinstance(weight, Packed) else "F16"
    outer, inner = weight.shape
    return device.choice("product", format=format, inner=inner, outer=outer, rows=most)["BLAS"] == 1


_SCRATCH_WEIGHTS = 1 << 26
"""Quantized weights that are converted to float16 at a time for BLAS."""


def _many_rows(device: GPU, x: Any, weight: Any, y: Any, column: int, *, accumulate: bool) -> None:
    """Through BLAS; quantized weights are converted to float16 some rows at a time."""
    if not isinstance(weight, Packed):
        device.matmul(x, weight, y, column, accumulate=accumulate)
        return
    outer, inner = weight.shape
    step = max(_SCRATCH_WEIGHTS // inner, 1)
    for first in range(0, outer, step):
        count = min(step, outer - first)
        scratch = device.scratch((count, inner), device.dtype)
        blocks = -(-count * inner // (weight.weights_per_thread * 128))
        sizes = (first, count, inner)
        device.run("dequantize", "dequantize", blocks, *weight.planes, scratch, *sizes, FORMAT=int(weight.type))
        device.matmul(x, scratch, y, column + first, accumulate=accumulate)


_MIN_NORMAL = 2.0**-14
"""The smallest float16 number that is not subnormal."""
_MAX_SLOPE = 1.13
"""gelu grows by this at most where its argument grows by 1; silu by 1.1. Both stay below their argument."""


@linear.slack
def _max_flushed(
    operand: Any, weight: Any, bias: Array | None, residual: Array | None, *, glu: str, split_k: str
) -> Array:
    """The largest error of a product whose factors are zeros where they are float16 subnormals.

    Matrix cores of MI200 take them so. Source: MIOpen's documentation, "MI200 matrix fused multiply-add (MFMA) behavior
    specifics".
    """
    x, matrix = operand, _matrix(weight)
    if isinstance(operand, Normed):  # the norm writes its stream: here a copy of it
        x = norm.reference(replace(operand, x=operand.x.copy()), out="act")
    off = np.asarray(_flushed(x) @ np.abs(matrix).T + np.abs(x) @ _flushed(matrix).T)
    if glu == "none":
        return off
    gate, up = np.split(np.abs(linear.reference(x, weight, bias, None, glu="none", split_k=split_k)), 2, axis=1)
    off_gate, off_up = np.split(off, 2, axis=1)
    return np.asarray(_MAX_SLOPE * off_gate * (up + off_up) + gate * off_up)


def _flushed(numbers: Array) -> Array:
    """What each number loses where float16 subnormals are zeros. A kernel may round larger numbers to subnormals."""
    sizes = np.abs(numbers)
    return np.where(sizes < 2 * _MIN_NORMAL, np.minimum(sizes, _MIN_NORMAL), 0.0)
