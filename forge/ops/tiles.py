"""The product of 2 to 64 rows of x with a matrix, on the matrix cores: how it is cut, and its launch."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.quant import Packed

MOST_ROWS = 64
"""Rows of x that a launch takes: the weights are read once for all of them."""
_TOKENS = (8, 16, 32, 64)
_LEAST_SLICE = 512
"""Numbers of the inner dimension that a block of its own takes at least."""
_MOST_TILE = 16
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
    choice = device.choice(
        "tile_linear",
        op="linear" if gated is None else "rms_gated",
        format=weight.type.name if isinstance(weight, Packed) else "F16",
        inner=inner,
        outer=outer,
        tokens=tokens,
    )
    waves = choice["BLOCK"] // device.wave
    block_outputs = 16 * choice["TILES"] * (waves // choice["SPLIT"])  # of a gate, half of them are
    blocks = -(-outer // block_outputs)
    slices = max(1, min(choice["SLICES"], device.cores * choice["CORE_BLOCKS"] // blocks, inner // _LEAST_SLICE))
    defines: dict[str, int | str] = {
        "FORMAT": int(weight.type) if isinstance(weight, Packed) else 1,
        "WEIGHT": "u8" if isinstance(weight, Packed) else "f16",
        "TOKENS": tokens,
        "TILES": choice["TILES"],
        "SPLIT": choice["SPLIT"],
        "AHEAD": choice["AHEAD"],
        "CORE_BLOCKS": choice["CORE_BLOCKS"],
        "BLOCK": choice["BLOCK"],
    }
    sums = counters = None
    if slices > 1:
        sums = device.scratch((blocks * slices * block_outputs * max(tokens, _MOST_TILE),), np.float32)
        counters = device.counters(blocks * (tokens // _TOKENS[0]))
    planes = weight.planes if isinstance(weight, Packed) else (weight, None, None, None)
    stride = outer if y is None else y.shape[1]
    arrays = x, *planes, bias, y, gated, sums, counters
    sizes = (rows, inner, outer, stride, column, int(accumulate), int(activation == "gelu"), blocks, slices)
    device.run("tile_linear", "tile_linear", (blocks, slices), *arrays, *sizes, **defines)
