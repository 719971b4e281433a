"""Cases of copies within the KV cache."""

from __future__ import annotations

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.ops.kv_cache import KVPages
from forge.ops.op import Array, Arrays


def random_pages(
    rng: np.random.Generator,
    lengths: list[int],
    filled: list[tuple[int, int]],
    page_size: int,
    kv_heads: int,
    dim: int,
    more_pages: int = 0,
) -> tuple[KVPages, Array]:
    """Keys and values of sequences in shuffled pages, and the page table. Pages that are released hold anything: NaN.

    filled: The positions of each sequence that have been written: the first, and the end.
    more_pages: Columns of the page table beyond those of the longest sequence.
    """
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + 2
    shuffled = rng.permutation(pages).astype(np.int32)
    table = np.full((len(lengths), max(needed) + more_pages), -1, np.int32)
    k, v = np.full((2, pages, page_size, kv_heads, dim), np.nan, np.float32)  # unused slots poison a result
    start = 0
    for row, (count, (first, end)) in enumerate(zip(needed, filled, strict=True)):
        chosen = shuffled[start : start + count]
        table[row, :count] = np.sort(chosen) if row % 2 else chosen  # runs of neighbouring pages and scattered ones
        start += count
        positions = np.arange(first, end)
        where = table[row, positions // page_size], positions % page_size
        k[where], v[where] = normal(rng, len(positions), 2, kv_heads, dim).swapaxes(0, 1)
    return KVPages(k, v), table


def _copy(name: str, *shape: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        k, v = normal(rng, 2, *shape)
        return k, v, 1, shape[1] - 1

    return Case(name, make)


CASES = {
    "copy_page": [
        _copy("odd sizes", 3, 4, 3, 1, 5),
        _copy("odd sizes, more than a block", 2, 3, 17, 1, 135),
        _copy("whole vectors", 2, 5, 16, 2, 64),
        _copy("whole vectors, not whole blocks", 2, 3, 64, 1, 80),
    ],
    "take_slots": [
        Case(
            "some, one twice",
            lambda rng: (np.array([5, 0, 11, 5], np.int32), normal(rng, 4, 3, 3, 100)),
        ),
        Case(
            "by hand",
            lambda rng: (np.array([3, 1], np.int32), np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1)),
            expected=([[[3]], [[1]]],),
        ),
    ],
}
