"""Token embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.op import Array, Arrays, Case, op
from forge.quant import QuantTensor


def _make(rng: np.random.Generator) -> Arrays:
    table = rng.standard_normal((7, 33)).astype(np.float32)
    return np.array([0, 6, 3, 3], np.int32), table, 1.5


@op(
    "ids:i32[T] table:weight[V,E] scale:f32 -> x:f32[T,E]",
    cases=[
        Case("float table", _make),
        Case("Q8_0 table", lambda rng: (np.array([4, 0, 4], np.int32), QuantTensor.random("Q8_0", 5, 64, rng), 2.0)),
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
