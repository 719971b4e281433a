"""Pairs of a row and one of its experts by expert, and tiles of them, which one block of a kernel multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import backend_of, register
from forge.backend.gpu import GPU
from forge.tuning.lds import FEW_ROWS
from forge.tuning.table import MATMUL_ROWS


@dataclass(frozen=True, slots=True)
class Grouped:
    """The experts of each row, int32 (M, U), with the list of their tiles.

    pairs: int32 (M * U,), numbers of pairs of a row and one of its experts, by expert and number. tiles: int32 (N, 4),
    of at most `rows` pairs, see expert_groups.hip.
    """

    chosen: Any
    pairs: Any
    tiles: Any
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.chosen.shape)

    @property
    def dtype(self) -> Any:
        return self.chosen.dtype


register(Grouped, lambda grouped: backend_of(grouped.chosen))


def empty_groups(device: GPU, chosen: Any, count: int, rows: int) -> Grouped:
    """Memory for a list of tiles of at most so many pairs; the host knows how many there can be."""
    total = chosen.shape[0] * chosen.shape[1]
    tiles = min(min(count, total) + total // rows, total)
    return Grouped(chosen, device.empty((total,), np.int32), device.empty((tiles, 4), np.int32), rows)


def rows_of(chosen: Any) -> Any:
    """The experts of each row as an array."""
    return chosen.chosen if isinstance(chosen, Grouped) else chosen


def tile_rows(device: GPU, rows: int, used: int, count: int, *, is_plain: bool = False) -> int:
    """Rows of a tile: the least that few experts exceed, else about four times as many as one has on average.

    is_plain: Of `expert_matmul`, the only kernel that there is without wgmma.
    """
    mean, least = rows * used / count, MATMUL_ROWS[1] if is_plain or not device.has_wgmma else FEW_ROWS[0]
    if rows <= least or 2 * mean <= least:
        return least
    return next((tokens for tokens in MATMUL_ROWS[1:] if min(rows, 4 * mean) <= tokens), MATMUL_ROWS[-1])
