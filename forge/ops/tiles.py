"""The product of 2 to 64 rows of x with a matrix, on the matrix cores: how it is cut, and its launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.quant import Packed

MOST_ROWS = 64
"""Rows of x that a launch takes: the weights are read once for all of them."""
_TOKENS = (8, 16, 32, 64)
_FEW_TOKENS = 16
_PLENTY = 8192
_CUTS = {  # (many outputs, many tokens): tiles of 16 outputs of a wave, waves that share them, waves of a block, ahead, blocks
    (False, False): (1, 4, 8, 1, 2),
    (False, True): (1, 1, 4, 1, 4),
    (True, False): (1, 4, 8, 1, 2),
    (True, True): (1, 1, 8, 1, 2),
}
_STAGE_BYTES = 16_384
_MOST_SLICES = 8
_LEAST_TILE = 16
"""Most tokens of a tile."""


def is_tiled(weight: Any) -> bool:
    """Whether the kernel reads such a matrix: rows of whole pieces of 8 numbers."""
    return isinstance(weight, Packed) or weight.shape[1] % 8 == 0


def tile_product(
    device: GPU,
    x: Any,
    weight: Any,
    bias: Any,
    y: Any = None,
    column: int = 0,
    *,
    accumulate: bool = False,
    gated: Any = None,
    activation: str = "silu",
) -> None:
    """y[:, column:column + N] = x @ weight.T + bias, or += with accumulate; x: act (M, K), weight: (N, K), M <= 64.

    With gated, act (M, N / 2): that becomes the activation of the product's first half, times its second half.
    """
    rows, inner = x.shape
    outer = weight.shape[0]
    tokens = next(most for most in _TOKENS if rows <= most)
    tiles, split, waves, ahead, core_blocks = _cut(weight, tokens)
    if gated is not None:
        tiles = 2
    defines: dict[str, int | str] = {
        "FORMAT": int(weight.type) if isinstance(weight, Packed) else 1,
        "WEIGHT": "u8" if isinstance(weight, Packed) else "f16",
        "TOKENS": tokens,
        "TILES": tiles,
        "SPLIT": split,
        "AHEAD": ahead,
        "STAGE_BYTES": _STAGE_BYTES,
        "CORE_BLOCKS": core_blocks,
        "BLOCK": device.wave * waves,
    }
    block_outputs = 16 * tiles * (waves // split)  # of a gate, half of them are
    blocks = -(-outer // block_outputs)
    slices = _slices(device.cores * core_blocks, blocks, inner)
    sums = device.scratch((blocks, slices, block_outputs * max(tokens, _LEAST_TILE)), np.float32) if slices > 1 else None
    counters = device.counters(blocks * (tokens // _TOKENS[0])) if slices > 1 else None
    planes = weight.planes if isinstance(weight, Packed) else (weight, None, None, None)
    stride = outer if y is None else y.shape[1]
    arrays = x, *planes, bias, y, gated, sums, counters
    sizes = (rows, inner, outer, stride, column, int(accumulate), int(activation == "gelu"), blocks, slices)
    device.run("tile_linear", "tile_linear", (blocks, slices), *arrays, *sizes, **defines)


def _cut(weight: Any, tokens: int) -> tuple[int, ...]:
    return _CUTS[weight.shape[0] >= _PLENTY, tokens > _FEW_TOKENS]


def _slices(places: int, blocks: int, inner: int) -> int:
    return max(1, min(_MOST_SLICES, places // blocks, inner // 512))
