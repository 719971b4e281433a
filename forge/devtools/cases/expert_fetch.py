"""Cases of experts that are copied from one memory to another."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case
from forge.ops.expert_fetch import PIECE
from forge.ops.op import Arrays


def _case(name: str, rows: int, count: int, used: int, sizes: tuple[int, ...], among: int = 0) -> Case:
    """sizes: Bytes of an expert in each part. among: Experts that are chosen are among so many."""

    def make(rng: np.random.Generator) -> Arrays:
        pieces = [-(-count * size // PIECE) for size in sizes]
        parts = np.stack([np.cumsum([0, *pieces[:-1]]), sizes], axis=1).astype(np.uint32)
        source, target = rng.integers(0, 2**32, (2, 4 * sum(pieces)), np.uint32)
        chosen = np.stack([rng.permutation(among or count)[:used] for _ in range(rows)]).astype(np.int32)
        return chosen, source, target, parts

    return Case(name, make)


def _by_hand() -> Case:
    """Of three experts the last one, in two parts."""

    def make(_: np.random.Generator) -> Arrays:
        source = np.arange(32, dtype=np.uint32)  # eight pieces: two for each expert, then half of one
        parts = np.array([[0, 32], [6, 8]], np.uint32)
        return np.array([[2]], np.int32), source, np.full(32, 99, np.uint32), parts

    written = [*16 * [99], *range(16, 24), *4 * [99], *range(28, 32)]
    return Case("by hand", make, written=(written,))


CASES = {
    "fetch_experts": [
        _by_hand(),
        _case("one row", 1, 9, 2, (4096, 272, 64)),
        _case("rows with experts in common", 40, 8, 3, (8192, 96, 32, 16), among=5),
        _case("bytes that are no whole pieces", 2, 7, 2, (102, 6, 33)),
        _case("all of 512", 300, 512, 2, (64, 16)),
    ],
}
