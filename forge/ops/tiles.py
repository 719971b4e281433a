"""The product of 2 to 64 rows of x with a matrix, on the matrix cores: how it is cut, and its launch."""

from __future__ import annotations

from typing import Any

from forge.backend.gpu import GPU
from forge.quant import Packed

MOST_ROWS = 64
"""Rows of x that a launch takes: the weights are read once for all of them."""
_TOKENS = (8, 16, 32, 64)
_FEW_TOKENS = 16
"""As many of a row in float16 lanes may read as it is."""
_MOST_PARTS = 4
"""Parts of the inner dimension that the lanes of a wave share, at most: TILE_PARTS of the tile files."""
_LEAST_TILE, _MOST_TILE = 8, 16
"""Tokens of a tile."""


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
        outer=outer if gated is None else outer // 2,
        tokens=tokens,
    )
    tiles, block = choice["TILES"], choice["BLOCK"]
    is_packed = isinstance(weight, Packed) or tokens > _FEW_TOKENS
    defines: dict[str, int | str] = {
        "FORMAT": int(weight.type) if isinstance(weight, Packed) else 1,
        "WEIGHT": "u8" if isinstance(weight, Packed) else "f16",
        "TOKENS": tokens,
        "PACKED": int(is_packed),
        "TILES": tiles,
        "TEAM": choice["TEAM"],
        "BLOCK": block,
    }
    if is_packed:
        # Lanes read it one beside the other: as it is, each would touch a line of the cache of its own.
        turn = _MOST_PARTS * (weight.unit if isinstance(weight, Packed) else 32)
        turns, waves = -(-inner // turn), block // device.wave
        packed = device.empty((max(tokens, _MOST_TILE), turns * turn), device.activations)
        blocks = -(-turns * (turn // 128) * -(-tokens // _LEAST_TILE) // waves)
        device.run("tile_linear", "tile_pack", blocks, x, packed, rows, inner, blocks * waves, **defines)
        x = packed
    blocks = -(-outer // (16 * tiles * (block // choice["TEAM"])))  # with a gate, a tile of it and one of what it gates
    planes = weight.planes if isinstance(weight, Packed) else (weight, None, None, None)
    stride = outer if y is None else y.shape[1]
    sizes = (rows, inner, outer, stride, column, int(accumulate), int(activation == "gelu"))
    device.run("tile_linear", "tile_linear", blocks, x, *planes, bias, y, gated, *sizes, **defines)
