"""Cases of the log probabilities."""

from __future__ import annotations

import math

import numpy as np

from forge.devtools.cases.case import Case
from forge.ops.op import Arrays

_INF = math.inf
_f32 = np.float32


def _pack(name: str, rows: int, count: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        ids, top_ids = (rng.integers(0, 999, shape).astype(np.int32) for shape in (rows, (rows, count)))
        return ids, rng.normal(size=rows).astype(_f32), top_ids, rng.normal(size=(rows, count)).astype(_f32)

    return Case(name, make)


CASES = {
    "logprobs": [
        Case(
            "by hand",
            lambda _: (
                np.array([[7, 7, 7, 7], [-3, -_INF, -_INF, -_INF], [5, 5, -_INF, -_INF], [0, math.nan, 0, 0]], _f32),
                np.array([1, 0, 2, 0], np.int32),
            ),
            expected=([-math.log(4), 0.0, -_INF, math.nan],),
        ),
        Case(
            "by hand: without an id where there is a distribution",
            lambda _: (np.array([[0, 0], [3, -_INF]], _f32), np.array([-1, -1], np.int32)),
            expected=([-math.log(2), 0.0],),
        ),
        Case(
            "without an id",
            lambda _: (np.array([[0, math.nan]], _f32), np.array([-1], np.int32)),
            expected=([math.nan],),
        ),
        Case(
            "by hand: far above all others, in each lane",
            lambda _: (200 * np.eye(64, dtype=_f32), np.arange(64, dtype=np.int32)),
            expected=([0.0] * 64,),
        ),
        Case(
            "random",
            lambda rng: (rng.normal(0, 5, (3, 5000)).astype(_f32), rng.integers(0, 5000, 3).astype(np.int32)),
        ),
    ],
    "top_logprobs": [
        Case(
            "ties in id order; without a distribution",
            lambda _: (np.array([[-900, 0, -901, 0, -900], [0, math.nan, 0, 0, 0]], _f32), 3),
            expected=([[1, 3, 0], [0, 1, 2]], [[-math.log(2), -math.log(2), -900 - math.log(2)], [math.nan] * 3]),
        ),
        Case("none", lambda rng: (rng.normal(size=(2, 4)).astype(_f32), 0)),
        Case("more than there are", lambda rng: (rng.normal(size=(2, 4)).astype(_f32), 9)),
        Case("random", lambda rng: (rng.normal(0, 5, (3, 5000)).astype(_f32), 20)),
        Case("ties in all waves", lambda rng: (rng.normal(0, 1, (3, 5000)).round().astype(_f32), 20)),
        Case("ties in all threads", lambda rng: (rng.normal(0, 0.4, (2, 5000)).round().astype(_f32), 20)),
        Case(
            "without a distribution: infinite, of either sign",
            lambda _: (np.array([[0, _INF, 0], [-_INF] * 3], _f32), 2),
            expected=([[0, 1]] * 2, [[math.nan] * 2] * 2),
        ),
    ],
    "pack_logprobs": [
        Case(
            "by hand",
            lambda _: (
                np.array([7], np.int32),
                np.array([-2.0], _f32),
                np.array([[9, 8]], np.int32),
                np.array([[1.0, -0.0]], _f32),
            ),
            expected=([[7, 9, 8, -(1 << 30), 0x3F800000, -(1 << 31)]],),
        ),
        _pack("none", 3, 0),
        _pack("more than a block", 2, 100),
    ],
}
