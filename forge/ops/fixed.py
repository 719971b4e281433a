"""Products on NumPy whose rows have the same bits whatever rows stand beside them."""

from __future__ import annotations

from functools import cache

import numpy as np

from forge.backend.threads import THREADS
from forge.ops.op import Array

_TILE_ROWS = 4
"""Rows of a call of BLAS, some of them zeros. Measured on 2 cores with AVX-512, all products of a 135M model: 1 row
takes 46 ms and 64 rows take 216 ms, one by one 42 and 509 ms. In tiles of 8 rows 1 takes 59 ms."""
_BLOCK_WEIGHTS = 1 << 16
"""Weights of a call: OpenBLAS neither packs them nor takes several threads for them."""
_BLOCK_OUTPUTS = 256
"""Most outputs of a call, for the same reason: _TILE_ROWS times as many must be at most 1,200."""


def product(matrix: Array, x: Array) -> Array:
    """x @ matrix.T: x (R, K), matrix (N, K) -> (R, N).

    Every call of BLAS has a shape that the matrix alone decides: a tile of rows, filled up with zeros, by a block of
    the matrix. Where such calls are slow, or a row's place in a tile decides its bits, a tile is one row: BLAS then
    multiplies it as a vector.
    """
    outer, inner = matrix.shape
    step = min(max(_BLOCK_WEIGHTS // inner, 1), _BLOCK_OUTPUTS, outer)
    is_tiled = THREADS.has_small_matrix_kernels and all(places_agree(n, inner) for n in {step, outer % step} - {0})
    rows = _TILE_ROWS if is_tiled else 1
    tiles = np.zeros((-(-len(x) // rows), rows, inner), x.dtype)
    tiles.reshape(-1, inner)[: len(x)] = x
    y = np.empty((*tiles.shape[:2], outer), x.dtype)

    def multiply(start: int, stop: int) -> None:
        _multiply(matrix[start * step : stop * step], tiles, y[:, :, start * step : stop * step], step)

    if is_tiled:
        THREADS.share(multiply, -(-outer // step))
    else:  # on the threads of BLAS
        multiply(0, outer)
    return y.reshape(-1, outer)[: len(x)]


def _multiply(matrix: Array, tiles: Array, y: Array, step: int) -> None:
    """y[t] = tiles[t] @ matrix.T, a call for each tile and each `step` rows of the matrix."""
    count, rest = divmod(len(matrix), step)
    whole = len(matrix) - rest
    blocks = matrix[:whole].reshape(count, 1, step, matrix.shape[1]).swapaxes(2, 3)
    out = y[:, :, :whole].reshape(*y.shape[:2], count, step).transpose(2, 0, 1, 3)
    with np.errstate(all="ignore"):  # a thread has its own
        np.matmul(tiles, blocks, out=out, order="C")  # in C order, a block stays in the cache from tile to tile
        if rest:
            np.matmul(tiles, matrix[whole:].T, out=y[:, :, whole:])


@cache
def places_agree(outputs: int, inner: int) -> bool:
    """Whether a row has the same bits at each place of a tile, with other rows beside it and anywhere in memory."""
    rng = np.random.default_rng(0)
    matrix, rows = (rng.standard_normal((count, inner), np.float32) for count in (outputs, _TILE_ROWS))
    rolled = [np.roll(rows, shift, axis=0) for shift in range(_TILE_ROWS)]
    found = []
    for shift, tile in enumerate(rolled):
        moved = np.empty(tile.size + shift, np.float32)[shift:].reshape(1, *tile.shape)
        moved[0] = tile
        y = np.empty((1, _TILE_ROWS, outputs + shift), np.float32)[:, :, shift:]
        _multiply(matrix, moved, y, outputs)
        found.append(np.roll(y[0], -shift, axis=0))
    return all(np.array_equal(y, found[0]) for y in found)
