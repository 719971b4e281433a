"""Cases of the per-request state that decode steps keep on the device."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, by_hand
from forge.ops.op import Arrays


def _inputs(name: str, rows: int, slots: int, pages: int, page_size: int, kinds: int = 1) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        tables = rng.integers(0, 1000, (kinds, slots, pages)).astype(np.int32)
        lengths = rng.integers(0, pages * page_size + 1, slots).astype(np.int32)
        chosen = rng.permutation(slots)[:rows].astype(np.int32)
        step = rng.integers(0, 9, 1).astype(np.int32)
        return chosen, rng.integers(0, 5000, slots).astype(np.int32), lengths, tables, step, page_size

    return Case(name, make)


CASES = {
    "decode_inputs": [
        _inputs("one", 1, 1, 1, 4),
        _inputs("some of the slots", 5, 9, 70, 16),
        _inputs("more rows than a block", 70, 90, 3, 4),
        _inputs("three kinds of layer state", 70, 90, 5, 16, 3),
        by_hand(
            "by hand: the fifth token of slot 1, on the second page of each kind",
            *([1], [7, 8], [1, 5], [[[0, 0, 0], [3, 2, 9]], [[0, 0, 0], [1, 7, 4]]], [6], 4),
            expected=([8], [4], [[8], [28]], [5]),
            written=([7],),
        ),
        by_hand(
            "by hand: idle slots, on page 6",
            *([0, 2, 1], [0, 7, 9], [0, 1, 0], [[[6, 1], [5, 3], [6, 2]]], [0], 4),
            expected=([0, 9, 7], [0, 0, 0], [[24, 24, 20]], [1, 1, 1]),
        ),
    ],
    "scatter": [
        by_hand(
            "by hand: the last word and the first, none between",
            *([[3, -7], [0, 5]], [1, 2, 3, 4]),
            written=([5, 2, 3, -7],),
        ),
        Case("nothing", lambda rng: (np.empty((0, 2), np.int32), np.array([4], np.int32)), written=([4],)),
        Case(
            "more than a block",
            lambda rng: (
                np.stack([rng.permutation(500)[:130], rng.integers(-9, 9, 130)], axis=1).astype(np.int32),
                rng.integers(0, 99, 500).astype(np.int32),
            ),
        ),
    ],
    "store_in_ring": [
        by_hand(
            "by hand: step 5 has the third of three entries",
            *([[1.5, 2.5], [3.5, 4.5]], [5], [[0.0] * 6, [0.5] * 6, [0.25] * 6], 1),
            written=([[0.0] * 6, [0.5] * 6, [0.25, 1.5, 2.5, 3.5, 4.5, 0.25]],),
        ),
        Case(
            "more than a block, to the end",
            lambda rng: (
                rng.standard_normal((3, 700)).astype(np.float32),
                np.array([9], np.int32),
                np.zeros((4, 2105), np.float32),
                5,
            ),
        ),
    ],
    "copy_rows": [
        by_hand(
            "by hand: the last row to the first, the first to the last",
            *([[2, 0], [0, 3]], [[1, 2], [3, 4], [5, 6]], [[7, 7], [8, 8], [9, 9], [0, 0]]),
            written=([[5, 6], [8, 8], [9, 9], [1, 2]],),
        ),
        Case(
            "nothing",
            lambda rng: (np.empty((0, 2), np.int32), np.ones((2, 3), np.int32), np.zeros((1, 3), np.int32)),
            written=([[0, 0, 0]],),
        ),
        Case(
            "one word each, more than a block",
            lambda rng: (
                np.stack([rng.integers(0, 90, 70), rng.permutation(200)[:70]], axis=1).astype(np.int32),
                rng.integers(0, 99, (90, 1)).astype(np.int32),
                rng.integers(0, 99, (200, 1)).astype(np.int32),
            ),
        ),
        Case(
            "rows longer than a block",
            lambda rng: (
                np.array([[1, 2], [3, 0]], np.int32),
                rng.integers(-9, 9, (4, 130)).astype(np.int32),
                rng.integers(-9, 9, (3, 130)).astype(np.int32),
            ),
        ),
    ],
    "clear": [
        by_hand("by hand", [3, -1], written=([0, 0],)),
        Case("more than a block", lambda rng: (rng.integers(-9, 9, 200).astype(np.int32),)),
    ],
    "advance": [
        by_hand(
            "by hand: one without an id",
            *([6, -1], [2, 0], [1, 2, 3], [10, 20, 30], None, [6, -1, 5], [5]),
            [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]],
            written=([0, 2, 6], [11, 20, 31], [[1, 2, 3, 4], [5, 6, 7, 8], [6, -1, 5, 12]]),
        ),
        by_hand(
            "by hand: an idle slot",
            *([1, 1], [0, 1], [2, 0], [9, 0], [[1, 0, 3], [1, 4, 0]], None, None, None),
            written=([1, 0], [10, 0], [[1, 2, 3], [1, 4, 0]]),
        ),
        by_hand(
            "by hand: new, in the prompt, generated before",
            *([1, 0, 2], [0, 1, 2], [7, 8, 9, 5], [10, 20, 30, 40], [[1, 0, 3], [1, 4, 0], [1, 1, 5]]),
            *(None, None, None),
            written=([1, 0, 2, 5], [11, 21, 31, 40], [[1, 2, 3], [2, 4, 0], [1, 1, 6]]),
        ),
        Case(
            "more rows than a block",
            lambda rng: (
                rng.integers(0, 100, 70).astype(np.int32),
                rng.permutation(90)[:70].astype(np.int32),
                rng.integers(0, 100, 90).astype(np.int32),
                rng.integers(0, 4, 90).astype(np.int32),
                rng.integers(0, 3, (90, 100)).astype(np.int32),
                rng.integers(0, 99, 70 * 6).astype(np.int32),
                np.array([9], np.int32),
                np.zeros((4, 70 * 6 + 5), np.int32),
            ),
        ),
    ],
}
