"""Token embedding, and taking rows of the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op
from forge.ops.quant import Packed, QuantTensor


@op("ids:i32[T] table:weight[V,E] scale:f32 -> x:f32[T,E]")
def embed(ids: Array, table: Any, scale: float) -> Array:
    """Rows of the table, times scale (sqrt(E) for Gemma), as the float32 residual stream."""
    rows = table.rows(ids) if isinstance(table, QuantTensor) else table[ids]  # (T, E)
    return rows if scale == 1.0 else rows * rows.dtype.type(scale)


@embed.gpu
def _embed_gpu(device: GPU, ids: Any, table: Any, scale: float) -> Any:
    width = table.shape[1]
    x = device.empty((len(ids), width), np.float32)
    if isinstance(table, Packed):
        device.run("dequantize", "quant_embed", len(ids), ids, *table.planes, x, width, scale, FORMAT=int(table.type))
    else:
        device.run("embed", "embed", len(ids), ids, table, x, width, scale, VECTOR=_vector(width))
    return x


@op("rows:i32[R] x:f32[T,E] -> y:f32[R,E]")
def take_rows(rows: Array, x: Array) -> Array:
    """x[rows]: the rows of the residual stream whose logits are wanted."""
    return np.asarray(x[rows])


@take_rows.gpu
def _take_rows_gpu(device: GPU, rows: Any, x: Any) -> Any:
    y = device.empty((len(rows), x.shape[1]), np.float32)
    device.run("embed", "take_rows", len(rows), rows, x, y, x.shape[1], VECTOR=_vector(x.shape[1]))
    return y


def _vector(width: int) -> int:
    """Numbers that a thread loads together."""
    return 4 if width % 4 == 0 else 1
