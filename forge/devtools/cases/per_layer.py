"""Cases of per-layer embeddings."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, by_hand, normal


def _inputs(tokens: int, layers: int, size: int) -> Case:
    shape = tokens, layers * size
    return Case(
        f"{tokens} tokens, {layers} layers of {size}",
        lambda rng: (normal(rng, *shape), normal(rng, *shape), 1 + 0.1 * normal(rng, size), 1e-5),
    )


def _gate(tokens: int, size: int, width: int, scale: float = 1.0) -> Case:
    return Case(
        f"{tokens} tokens, {size} of a stream of {width} times {scale:g}",
        lambda rng: (
            normal(rng, tokens, size) / np.float32(scale),
            normal(rng, tokens, width) * np.float32(scale),
            normal(rng, tokens, 3 * size),
            size,
            1e-6,
        ),
    )


CASES = {
    "per_layer_inputs": [
        *(_inputs(*sizes) for sizes in ((1, 1, 4), (3, 5, 256), (2, 3, 100), (70, 2, 33))),
        # mean squares 4 and 1: (2 / 2 * 3 + 1) / sqrt(2), (-2 / 2 * 1 + 3) / sqrt(2), ...
        by_hand(
            "by hand",
            [[2.0, -2.0, 1.0, -1.0]],
            [[1.0, 3.0, -3.0, 1.0]],
            [3.0, 1.0],
            0.0,
            expected=([[8**0.5, 2**0.5, 0.0, 0.0]],),
        ),
    ],
    "per_layer_gate": [
        *(_gate(*sizes) for sizes in ((1, 4, 8), (3, 256, 640), (2, 33, 70), (5, 300, 1000, 1e5))),
        # the root mean square is 5: gelu(20) * 3 and gelu(-20) * 4 of the second layer
        by_hand(
            "by hand",
            [[4.0, -4.0]],
            [[5.0, -5.0, 5.0]],
            [[7.0, 7.0, 3.0, 4.0]],
            2,
            0.0,
            expected=([[60.0, 0.0]],),
        ),
    ],
}
