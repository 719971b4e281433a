"""Cases of the log probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from forge.devtools.cases.case import Case, by_hand
from forge.ops.op import Array, Arrays

_INF = math.inf
_f32 = np.float32


def _pack(name: str, rows: int, count: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        return rng.integers(0, 999, (rows, count)).astype(np.int32), rng.normal(size=(rows, count)).astype(_f32)

    return Case(name, make)


def _top(name: str, logits: Callable[[np.random.Generator], Array], n: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        z = logits(rng).astype(_f32)
        return z, rng.integers(0, z.shape[1], len(z)).astype(np.int32), n

    return Case(name, make)


CASES = {
    "logprobs": [
        by_hand(
            "by hand",
            [[7, 7, 7, 7], [-3, -_INF, -_INF, -_INF], [5, 5, -_INF, -_INF], [0, math.nan, 0, 0]],
            *([1, 0, 2, 0], 0),
            expected=([[1], [0], [2], [0]], [[-math.log(4)], [0.0], [-_INF], [math.nan]]),
        ),
        by_hand(
            "by hand: without an id where there is a distribution",
            *([[0, 0], [3, -_INF]], [-1, -1], 1),
            expected=([[-1, 0], [-1, 0]], [[-math.log(2)] * 2, [0.0, 0.0]]),
        ),
        by_hand("without an id", [[0, math.nan]], [-1], 0, expected=([[-1]], [[math.nan]])),
        Case(
            "by hand: far above all others, in each lane",
            lambda _: (200 * np.eye(64, dtype=_f32), np.arange(64, dtype=np.int32), 0),
            expected=([[i] for i in range(64)], [[0.0]] * 64),
        ),
        by_hand(
            "by hand: ties in id order; without a distribution",
            *([[-900, 0, -901, 0, -900], [0, math.nan, 0, 0, 0]], [2, 4], 3),
            expected=(
                [[2, 1, 3, 0], [4, 0, 1, 2]],
                [[-901 - math.log(2), -math.log(2), -math.log(2), -900 - math.log(2)], [math.nan] * 4],
            ),
        ),
        by_hand(
            "by hand: without a distribution: infinite, of either sign",
            *([[0, _INF, 0], [-_INF] * 3], [2, 0], 2),
            expected=([[2, 0, 1], [0, 0, 1]], [[math.nan] * 3] * 2),
        ),
        _top("none beside the id", lambda rng: rng.normal(size=(2, 4)), 0),
        _top("more than there are", lambda rng: rng.normal(size=(2, 4)), 9),
        _top("random", lambda rng: rng.normal(0, 5, (3, 5000)), 20),
        _top("ties in all waves", lambda rng: rng.normal(0, 1, (3, 5000)).round(), 20),
        _top("ties in all threads", lambda rng: rng.normal(0, 0.4, (2, 5000)).round(), 20),
    ],
    "pack_logprobs": [
        by_hand(
            "by hand",
            *([[7, 9, 8]], [[-2.0, 1.0, -0.0]]),
            expected=([[7, 9, 8, -(1 << 30), 0x3F800000, -(1 << 31)]],),
        ),
        _pack("one", 3, 1),
        _pack("more than a block", 2, 101),
    ],
}
