"""Cases of copies within the KV cache."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case
from forge.ops.op import Arrays


def _copy(name: str, *shape: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        k, v = rng.standard_normal((2, *shape)).astype(np.float32)
        return k, v, 1, shape[1] - 1

    return Case(name, make)


CASES = {
    "copy_page": [
        _copy("odd sizes", 3, 4, 3, 1, 5),
        _copy("odd sizes, more than a block", 2, 3, 17, 1, 135),
        _copy("whole vectors", 2, 5, 16, 2, 64),
        _copy("whole vectors, not whole blocks", 2, 3, 64, 1, 80),
    ],
    "take_slots": [
        Case(
            "some, one twice",
            lambda rng: (np.array([5, 0, 11, 5], np.int32), rng.standard_normal((4, 3, 3, 100)).astype(np.float32)),
        ),
        Case(
            "by hand",
            lambda rng: (np.array([3, 1], np.int32), np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1)),
            expected=([[[3]], [[1]]],),
        ),
    ],
}
