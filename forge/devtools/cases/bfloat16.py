"""Cases of bfloat16 that becomes float16."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case
from forge.ops.op import Arrays


def _every(_: np.random.Generator) -> Arrays:
    """All numbers but NaN, whose bits kernels may choose."""
    numbers = np.arange(1 << 16, dtype=np.uint16)
    numbers = numbers[(numbers & 0x7FFF) <= 0x7F80]
    return numbers.view(np.uint32), np.zeros(1, np.int32)


def _small(count: int) -> Case:
    """Numbers within float16; the last thread has a part of its words."""

    def make(rng: np.random.Generator) -> Arrays:
        bits = (0.02 * rng.standard_normal(2 * count)).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint32), np.zeros(1, np.int32)

    return Case(f"N{count}", make)


def _by_hand() -> Case:
    """1.0, -2.5; 65,280 and what is beyond; 2**-25 rounds to an even 0, and three halves of it to 2**-24."""
    given = np.array([0x3F80, 0xC020, 0x477F, 0x4780, 0x3300, 0x3340], np.uint16)
    made = np.array([0x3C00, 0xC100, 0x7BF8, 0x7C00, 0x0000, 0x0001], np.uint16)
    written = made.view(np.uint32), np.ones(1, np.int32)
    return Case("by hand", lambda _: (given.view(np.uint32).copy(), np.zeros(1, np.int32)), written=written)


CASES = {"bf16_to_f16": [_by_hand(), Case("every number", _every), _small(1), _small(1027)]}
