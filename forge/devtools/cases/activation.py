"""Cases of the activations and the sum."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, normal


def _random(activation: str, rows: int, width: int, scale: float) -> Case:
    return Case(
        f"{activation} {rows}x{width} scale {scale:g}",
        lambda rng: ((rng.standard_normal((rows, 2 * width)) * scale).astype(np.float32),),
        {"activation": activation},
    )


def _by_hand(activation: str, gate: int, expected: int) -> Case:
    return Case(
        f"{activation} by hand",
        lambda rng: (np.array([[0, gate, -gate, 3, 5, 7]], np.float32),),
        {"activation": activation},
        expected=([[0, expected, 0]],),
    )


_SIZES = ((1, 1, 2.0), (1, 31, 2.0), (3, 64, 2.0), (2, 65, 2.0), (5, 1536, 2.0), (2, 40, 100.0))

CASES = {
    "act_and_mul": [
        *(_random(activation, *sizes) for activation in ("silu", "gelu") for sizes in _SIZES),
        _by_hand("silu", 200, 1000),
        _by_hand("gelu", 20, 100),
    ],
    "gelu": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 3,)),
        Case("by hand", lambda rng: (np.array([[0, 20, -20]], np.float32),), expected=([[0, 20, 0]],)),
    ],
    "soft_cap": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 20, 30.0)),
        Case("by hand", lambda rng: (np.array([[0, 1e9, -1e9]], np.float32), 5.0), expected=([[0, 5, -5]],)),
    ],
    "add": [
        Case("random", lambda rng: tuple(normal(rng, 2, 3, 300))),
        Case(
            "by hand",
            lambda rng: (np.array([[1, 2]], np.float32), np.array([[3, -5]], np.float32)),
            expected=([[4, -3]],),
        ),
    ],
}
