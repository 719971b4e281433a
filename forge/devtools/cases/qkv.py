"""Cases of the edits of the QKV product."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, by_hand, normal
from forge.ops.op import Arrays


def _whole(tokens: int, queries: int, keys: int, scale: float = 1.0) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        product = normal(rng, tokens, queries + 2 * keys) * np.float32(scale)
        return product, 1 + 0.1 * normal(rng, queries), 1 + 0.1 * normal(rng, keys), 1e-5

    return Case(f"{tokens} tokens, {queries} and {keys}, scale {scale:g}", make)


def _rotated(name: str, tokens: int, heads: tuple[int, int], dim: int, rotated: int, style: str) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        angles = normal(rng, 40, rotated // 2) * 3
        product = normal(rng, tokens, sum(heads) * dim)
        cos_sin = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        return product, cos_sin, rng.integers(0, 40, tokens).astype(np.int32), heads[0], dim

    return Case(f"{style} {name}", make, {"style": style})


_QUARTER_TURN = [[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]
"""At position 1 each pair (a, b) becomes (-b, a)."""

CASES = {
    "clamp": [
        Case("random", lambda rng: (normal(rng, 3, 165), 0.5)),
        by_hand("by hand", [[0.5, 3, -3]], 2.0, written=([[0.5, 2, -2]],)),
    ],
    "rmsnorm_whole": [
        _whole(1, 1, 1),
        _whole(3, 96, 32),
        _whole(2, 1030, 513),
        _whole(2, 640, 320, 1e4),
        # 3 and 4 have the mean square 12.5, with eps = 3.5 the divisor is 4; k is 2 / sqrt(7.5)
        by_hand(
            *("by hand", [[3.0, 4, 2, 7]], [1.0, 2], [10.0], 3.5),
            written=([[0.75, 2, 20 / np.sqrt(7.5), 7]],),
        ),
    ],
    "rotate_heads": [
        *(
            _rotated(*case, style)
            for style in ("neox", "interleaved")
            for case in (
                ("one token", 1, (2, 1), 4, 4),
                ("grouped", 3, (8, 2), 64, 64),
                ("partial", 7, (4, 2), 80, 32),
            )
        ),
        *(
            by_hand(
                *(f"{style} by hand", [[1.0, 2, 3, 4, 5, 6, 7, 8]], _QUARTER_TURN, [1], 1, 4),
                options={"style": style},
                written=([[*turned, 5, 6, 7, 8]],),
            )
            for style, turned in (("neox", [-3, -4, 1, 2]), ("interleaved", [-2, 1, -4, 3]))
        ),
    ],
}
