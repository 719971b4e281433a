"""Cases of the token embedding and of taking rows."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, by_hand, normal
from forge.ops.op import Arrays
from forge.ops.quant import FORMATS, QuantTensor


def _floats(rng: np.random.Generator) -> Arrays:
    table = normal(rng, 7, 33)
    return np.array([0, 6, 3, 3], np.int32), table, 1.5


def _wide(rng: np.random.Generator) -> Arrays:
    return np.array([2, 0], np.int32), normal(rng, 3, 4100), 1.5


def _quantized(name: str, width: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return np.array([4, 0, 4], np.int32), QuantTensor.random(name, 5, width, rng), 2.0

    return Case(f"{name} table, E{width}", make)


def _rows(width: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return np.array([1, 1, 0], np.int32), normal(rng, 2, width)

    return Case(f"rows of {width}", make)


CASES = {
    "embed": [
        Case("float table", _floats),
        Case("wide float table", _wide),
        *(_quantized(name, 512) for name in FORMATS),
        *(_quantized(name, 8448) for name in ("Q8_0", "Q2_K", "Q6_K")),
        by_hand("by hand", [1, 0], [[1.0, 2], [3, 4]], 10.0, expected=([[30, 40], [10, 20]],)),
    ],
    "take_rows": [
        Case(
            "some, one twice",
            lambda rng: (np.array([4, 0, 4], np.int32), normal(rng, 5, 300)),
        ),
        *(_rows(width) for width in (1100, 333)),
    ],
}
