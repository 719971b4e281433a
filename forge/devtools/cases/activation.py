"""Cases of the activations and the sum."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, by_hand, normal


def _random(activation: str, rows: int, width: int, scale: float) -> Case:
    return Case(
        f"{activation} {rows}x{width} scale {scale:g}",
        lambda rng: ((rng.standard_normal((rows, 2 * width)) * scale).astype(np.float32),),
        {"activation": activation},
    )


def _by_hand(activation: str, gate: int, expected: int) -> Case:
    gated = [[0.0, gate, -gate, 3, 5, 7]]
    return by_hand(f"{activation} by hand", gated, options={"activation": activation}, expected=([[0, expected, 0]],))


_SIZES = ((1, 1, 2.0), (1, 31, 2.0), (3, 64, 2.0), (2, 65, 2.0), (5, 1536, 2.0), (2, 40, 100.0))

CASES = {
    "act_and_mul": [
        *(_random(activation, *sizes) for activation in ("silu", "gelu") for sizes in _SIZES),
        _by_hand("silu", 200, 1000),
        _by_hand("gelu", 20, 100),
    ],
    "gelu": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 3,)),
        by_hand("by hand", [[0.0, 20, -20]], expected=([[0, 20, 0]],)),
    ],
    "gelu_erf": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 3,)),
        by_hand(
            "by hand: far", [[0.0, 40, -40, 1, -1]], expected=([[0, 40, 0, 0.8413447460685429, -0.15865525393145707]],)
        ),
    ],
    "xielu": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 3, -0.5, 0.4, 0.3, -1e-6)),
        Case("random with a bound", lambda rng: (normal(rng, 3, 165) * 3, -0.5, 0.4, 0.3, -1.0)),
        # softplus(ln(e - 1)) is 1, so x > 0 is x**2 + 0.5 x, and far below it is 1.5 (-1 - x) + 0.5 x
        by_hand(
            *("by hand", [[2.0, -40]], 0.5413248546129181, 0.5413248546129181, 0.5, -1e-6),
            expected=([[5, 38.5]],),
        ),
    ],
    "soft_cap": [
        Case("random", lambda rng: (normal(rng, 3, 165) * 20, 30.0)),
        by_hand("by hand", [[0, 1e9, -1e9]], 5.0, expected=([[0, 5, -5]],)),
    ],
    "add": [
        Case("random", lambda rng: tuple(normal(rng, 2, 3, 300))),
        by_hand("by hand", [[1.0, 2]], [[3.0, -5]], expected=([[4, -3]],)),
    ],
    "add_and_scale": [
        Case("random", lambda rng: (*normal(rng, 2, 3, 300), 0.7)),
        Case("nothing to add", lambda rng: (normal(rng, 3, 70), None, 0.7)),
        by_hand("by hand", [[1.0, 2]], [[3.0, -5]], 0.5, written=([[2, -1.5]],)),
    ],
    "sigmoid_gate": [
        Case("a gate a number", lambda rng: (normal(rng, 3, 300), 2 * normal(rng, 3, 500), 300)),
        Case("a gate a head", lambda rng: (normal(rng, 5, 6 * 64), 2 * normal(rng, 5, 40), 6)),
        Case("gates at both ends", lambda rng: (normal(rng, 2, 64), 100 * normal(rng, 2, 64), 64)),
        by_hand("by hand", [[8.0, 4.0]], [[5.0, np.log(3), -np.log(3)]], 2, expected=([[6, 1]],)),
    ],
}
