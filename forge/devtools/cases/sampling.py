"""Cases of drawing tokens."""

from __future__ import annotations

import math

import numpy as np

from forge.devtools.cases.case import Case, by_hand
from forge.ops.op import Arrays

_INF = math.inf
_f32 = np.float32


def _rows(logits: list[list[float]], *limits: tuple[float, int, float, float]) -> Arrays:
    temperature, top_k, top_p, min_p = zip(*limits, strict=True)
    zero = np.zeros(len(limits), np.uint32)
    return (
        np.array(logits, _f32), np.array(temperature, _f32), np.array(top_k, np.int32), np.array(top_p, _f32),
        np.array(min_p, _f32), zero.astype(np.uint64), zero, zero,
    )  # fmt: skip


def _random(rng: np.random.Generator, b: int, v: int, step: float = 0.0) -> Arrays:
    """`step` rounds the logits, which makes ties."""
    logits = rng.normal(0.0, 3.0, (b, v))
    logits = np.round(logits / step) * step if step else logits
    logits[rng.random((b, v)) < 0.05] = -np.inf
    logits[:, 0] = 1.0
    return (
        logits.astype(_f32),
        rng.choice([0.0, 0.1, 0.8, 1.0, 5.0, 100.0], b).astype(_f32),
        rng.choice([0, 1, 7, 50, v, 2 * v], b).astype(np.int32),
        rng.choice([1e-6, 0.3, 0.9, 0.95, 1.0], b).astype(_f32),
        rng.choice([0.0, 0.01, 0.3, 1.0], b).astype(_f32),
        rng.integers(0, 2**64, b, np.uint64),
        rng.integers(0, 8, b).astype(np.uint32),
        rng.integers(0, 2**17, b).astype(np.uint32),
    )


def _seeded(arguments: Arrays, seed: int) -> Arrays:
    return (*arguments[:5], np.full(len(arguments[0]), seed, np.uint64), *arguments[6:])


def _sampling_cases() -> list[Case]:
    # Seed, choice and position 0 give the bits 0xe169c58d6627e8d5, a fraction of 0.8805.
    inf, nan = _INF, math.nan
    greedy, plain = (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)
    return [
        Case(
            "greedy: the lowest id of equals, -1 without a distribution",
            lambda _: _rows([[1, 3, 3], [-inf, -2, -inf], [0, nan, 0], [-inf] * 3, [0, inf, 0]], *[greedy] * 5),
            expected=([1, 1, -1, -1, -1],),
        ),
        Case(
            "drawn without a distribution",
            lambda _: _rows([[0, nan, 0], [-inf] * 3, [0, inf, 0], [0, -nan, 0]], *[plain] * 4),
            expected=([-1, -1, -1, -1],),
        ),
        Case(
            "four equals: 0.8805 of all 4, of the first 2 (k), 2 (p), 3 (p), 2 of 3 (k then p)",
            lambda _: _rows([[5.0] * 4] * 5, plain, (1, 2, 1, 0), (1, 0, 0.5, 0), (1, 0, 0.75, 0), (1, 3, 0.5, 0)),
            expected=([3, 1, 1, 2, 1],),
        ),
        Case(
            "1 : e : 0.8: all; 0.8 is below min_p = 0.3 e; the one token left by p and by min_p",
            lambda _: _rows([[0, 1, -0.2231]] * 4, plain, (1.0, 0, 1.0, 0.3), (1.0, 0, 1e-9, 0.0), (1.0, 0, 1.0, 1.0)),
            expected=([2, 1, 1, 1],),
        ),
        Case(
            "two tokens, of which the first has less than p by less than 1 of 2**43: a share rounds up",
            lambda _: _rows([[0.0, -0.06276973]], (1.0, 0, 0.5156873, 0.0)),
            expected=([1],),
        ),
        Case(
            "a token of weight 8139031, which the seed draws, and one of 2**42; min_p of 8139031.5 / 2**42 rounds up",
            lambda _: _seeded(_rows([[0.0, -13.2]] * 2, plain, (1.0, 0, 1.0, 1.8506015e-06)), 151_054),
            expected=([1, 0],),
        ),
        Case(
            "as many equals as a list holds, one fewer and one more: 0.8805 of half of them",
            lambda _: _rows([[5.0] * n + [-inf] * (1025 - n) for n in (1023, 1024, 1025)], *[(1, 0, 0.5, 0)] * 3),
            expected=([450, 450, 451],),
        ),
        Case(
            "2600 equals around 2 tokens of other bins, or one of theirs: of the first 2500 (k), most of them (p)",
            lambda _: _rows(
                [[z] * 1300 + [9.0, 6.0] + [z] * 1300 + [-30.0] for z in (5.0, 5.999) for _ in range(4)],
                *[(100, 2500, 1, 0), (1, 2500, 0.99, 0), (1, 0, 0.99, 0), (1, 2500, 1, 0.5)] * 2,
            ),
        ),
        Case("one token", lambda _: _rows([[-7.0]] * 2, greedy, (0.5, 3, 0.5, 0.5)), expected=([0, 0],)),
        Case("random", lambda rng: _random(rng, 16, 1000)),
        Case("many ties", lambda rng: _random(rng, 16, 257, step=2.0)),
        Case(
            "0.8805 of 3000 equals, of the first 2500 (k), 1500 (p), 1250 (k then p), 1 (k)",
            lambda _: _rows(
                [[5.0] * 3000] * 5, plain, (1, 2500, 1, 0), (1, 0, 0.5, 0), (1, 2500, 0.5, 0), (1, 1, 1, 1)
            ),
            expected=([2641, 2201, 1320, 1100, 0],),
        ),
        Case(
            "a token of weight 2**42, and 1500 of about 2**32: their sums carry to the high word",
            lambda _: _rows([[0.0] + [-6.25, -6.95] * 750], (1, 0, 0.5, 0)),
        ),
        Case("chunks", lambda rng: _random(rng, 4, 5000)),
        Case("chunks, many ties", lambda rng: _random(rng, 4, 5000, step=0.25)),
    ]


CASES = {
    "argmax": [
        by_hand(
            "the lowest id of equals, -1 without a distribution",
            [[1, 3, 3], [-_INF, -2, -_INF], [0, math.nan, 0], [-_INF] * 3, [0, _INF, 0]],
            expected=([1, 1, -1, -1, -1],),
        ),
        by_hand("a NaN of either sign", [[0, math.nan], [-math.nan, 0]], expected=([-1, -1],)),
        by_hand("zeros of both signs", [[-1, -0.0, 0.0, -0.0]], expected=([1],)),
        by_hand("one token", [[-7.0]], expected=([0],)),
        Case("chunks", lambda rng: (rng.normal(0, 3, (2, 5000)).round().astype(_f32),)),
        Case("more rows than chunks", lambda rng: (rng.normal(0, 3, (70, 1100)).astype(_f32),)),
    ],
    "sample": _sampling_cases(),
}
