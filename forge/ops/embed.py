"""Token embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Arrays, Case, op
from forge.ops.quant import FORMATS, Packed, QuantTensor


def _make(rng: np.random.Generator) -> Arrays:
    table = rng.standard_normal((7, 33)).astype(np.float32)
    return np.array([0, 6, 3, 3], np.int32), table, 1.5


def _wide(rng: np.random.Generator) -> Arrays:
    return np.array([2, 0], np.int32), rng.standard_normal((3, 4100)).astype(np.float32), 1.5


def _quantized(name: str, width: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return np.array([4, 0, 4], np.int32), QuantTensor.random(name, 5, width, rng), 2.0

    return Case(f"{name} table, E{width}", make)


def _vector(width: int) -> int:
    """Numbers that a thread takes together."""
    return 4 if width % 4 == 0 else 1


def _embed_gpu(device: GPU, ids: Any, table: Any, scale: float) -> Any:
    width = table.shape[1]
    x = device.empty((len(ids), width), np.float32)
    if isinstance(table, Packed):
        device.run("quant", "quant_embed", len(ids), ids, *table.planes, x, width, scale, FORMAT=int(table.type))
    else:
        device.run("embed", "embed", len(ids), ids, table, x, width, scale, VECTOR=_vector(width))
    return x


@op(
    "ids:i32[T] table:weight[V,E] scale:f32 -> x:f32[T,E]",
    gpu=_embed_gpu,
    cases=[
        Case("float table", _make),
        Case("wide float table", _wide),
        *(_quantized(name, 512) for name in FORMATS),
        *(_quantized(name, 8448) for name in ("Q8_0", "Q2_K", "Q6_K")),
        Case(
            "by hand",
            lambda rng: (np.array([1, 0], np.int32), np.array([[1, 2], [3, 4]], np.float32), 10.0),
            expected=([[30, 40], [10, 20]],),
        ),
    ],
)
def embed(ids: Array, table: Any, scale: float) -> Array:
    """Rows of the table, times scale (sqrt(E) for Gemma), as the float32 residual stream."""
    rows = table.rows(ids) if isinstance(table, QuantTensor) else table[ids]  # (T, E)
    return rows if scale == 1.0 else rows * rows.dtype.type(scale)


def _rows(width: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return np.array([1, 1, 0], np.int32), rng.standard_normal((2, width)).astype(np.float32)

    return Case(f"rows of {width}", make)


def _take_rows_gpu(device: GPU, rows: Any, x: Any) -> Any:
    y = device.empty((len(rows), x.shape[1]), np.float32)
    device.run("embed", "take_rows", len(rows), rows, x, y, x.shape[1], VECTOR=_vector(x.shape[1]))
    return y


@op(
    "rows:i32[R] x:f32[T,E] -> y:f32[R,E]",
    gpu=_take_rows_gpu,
    cases=[
        Case(
            "some, one twice",
            lambda rng: (np.array([4, 0, 4], np.int32), rng.standard_normal((5, 300)).astype(np.float32)),
        ),
        *(_rows(width) for width in (1100, 333)),
    ],
)
def take_rows(rows: Array, x: Array) -> Array:
    """x[rows]: those rows of the residual stream whose logits are wanted."""
    return np.asarray(x[rows])
