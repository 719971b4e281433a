"""Cases of penalties and logit bias."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from forge.devtools.cases.case import Case
from forge.ops.op import Arrays

_INF = math.inf
_f32 = np.float32


def _penalty_cases() -> list[Case]:
    def arguments(logits: Any, counts: Any, penalties: Any, bias: Any) -> Arrays:
        """Three penalties for each row."""
        repetition, presence, frequency = np.array(penalties, _f32).T.copy()
        return np.array(logits, _f32), np.array(counts, np.int32), np.array(bias, _f32), repetition, presence, frequency

    def random(rng: np.random.Generator, b: int, v: int) -> Arrays:
        bias = np.where(rng.random((b, v)) < 0.1, rng.normal(size=(b, v)), 0)
        penalties = rng.uniform((0.5, -1, -1), (2, 1, 1), (b, 3))
        return arguments(rng.normal(0, 3, (b, v)), rng.integers(0, 5, (b, v)), penalties, bias)

    return [
        Case(
            "by hand: once, twice and not yet generated; forbidden; no penalties",
            lambda _: arguments(
                [[2, -2, 4, 1, 8], [1, 2, 3, 4, 5]],
                [[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]],
                [(2, 0.5, 0.25), (9, 9, 9)],
                [[0, 1, 0, -_INF, 0], [5, 0, 0, 0, 0]],
            ),
            expected=([[1, -2.75, 1, -_INF, 8], [6, 2, 3, 4, 5]],),
        ),
        Case(
            "forbidden tokens",
            lambda rng: arguments(rng.normal(size=(1, 3)), [[1, 0, 2]], [(2, 1, 1)], [[-_INF, 0, -_INF]]),
        ),
        Case("random", lambda rng: random(rng, 5, 64)),
        Case("more than a block", lambda rng: random(rng, 2, 300)),
        Case("one token", lambda rng: random(rng, 1, 1)),
    ]


CASES = {"penalize": _penalty_cases()}
