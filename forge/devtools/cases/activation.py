"""Cases of the activations and the sum."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case


def _case(rows: int, width: int, scale: float = 2.0) -> Case:
    return Case(
        f"{rows}x{width} scale {scale:g}",
        lambda rng: ((rng.standard_normal((rows, 2 * width)) * scale).astype(np.float32),),
    )


_GATED = [_case(1, 1), _case(1, 31), _case(3, 64), _case(2, 65), _case(5, 1536), _case(2, 40, 100.0)]

CASES = {
    "silu_mul": [
        *_GATED,
        Case("by hand", lambda rng: (np.array([[0, 200, -200, 3, 5, 7]], np.float32),), expected=([[0, 1000, 0]],)),
    ],
    "gelu_mul": [
        *_GATED,
        Case("by hand", lambda rng: (np.array([[0, 20, -20, 3, 5, 7]], np.float32),), expected=([[0, 100, 0]],)),
    ],
    "gelu": [
        Case("random", lambda rng: (rng.standard_normal((3, 165)).astype(np.float32) * 3,)),
        Case("by hand", lambda rng: (np.array([[0, 20, -20]], np.float32),), expected=([[0, 20, 0]],)),
    ],
    "soft_cap": [
        Case("random", lambda rng: (rng.standard_normal((3, 165)).astype(np.float32) * 20, 30.0)),
        Case("by hand", lambda rng: (np.array([[0, 1e9, -1e9]], np.float32), 5.0), expected=([[0, 5, -5]],)),
    ],
    "add": [
        Case("random", lambda rng: tuple(rng.standard_normal((2, 3, 300)).astype(np.float32))),
        Case(
            "by hand",
            lambda rng: (np.array([[1, 2]], np.float32), np.array([[3, -5]], np.float32)),
            expected=([[4, -3]],),
        ),
    ],
}
