"""The product of 2 to 64 rows of x with a matrix, on the matrix cores: how it is cut, and its launch."""

from __future__ import annotations

from typing import Any

from forge.backend.gpu import GPU
from forge.quant import Packed

MOST_ROWS = 64
"""Rows of x that a launch takes: the weights are read once for all of them."""
_TOKENS = (8, 16, 32, 64)
_GATES = {"none": 0, "silu": 1, "gelu": 2}
_WAVES = 8
_PLENTY = 8192
"""From so many outputs there are blocks enough: a wave may take two tiles, and fewer waves share one."""


def is_tiled(weight: Any) -> bool:
    """Whether the kernel reads such a matrix: rows of whole pieces of 8 numbers."""
    return isinstance(weight, Packed) or weight.shape[1] % 8 == 0


def tile_product(
    device: GPU, x: Any, weight: Any, bias: Any, y: Any, column: int, *, accumulate: bool, gate: str = "none"
) -> None:
    """y[:, column:column + N] = x @ weight.T + bias, or += with accumulate; x: act (M, K), weight: (N, K), M <= 64.

    With a gate N is N / 2: the activation of the first half of the product, times the second half.
    """
    rows, inner = x.shape
    outer = weight.shape[0]
    is_gated = gate != "none"
    tokens = next(most for most in _TOKENS if rows <= most)
    tiles, split = _cut(outer, tokens, is_gated)
    defines: dict[str, int | str] = {
        "FORMAT": int(weight.type) if isinstance(weight, Packed) else 1,
        "WEIGHT": "u8" if isinstance(weight, Packed) else "f16",
        "TOKENS": tokens,
        "TILES": tiles,
        "SPLIT": split,
        "BLOCK": device.wave * _WAVES,
        "GATE": _GATES[gate],
        "OUT": "f16" if is_gated else "float",
    }
    outputs = 16 * tiles * (_WAVES // split)  # rows of the matrix that a block takes
    planes = weight.planes if isinstance(weight, Packed) else (weight, None, None, None)
    sizes = (rows, inner, outer, y.shape[1], column, int(accumulate))
    device.run("tile_linear", "tile_linear", -(-outer // outputs), x, *planes, bias, y, *sizes, **defines)


def _cut(outer: int, tokens: int, is_gated: bool) -> tuple[int, int]:
    """Tiles of a wave, and waves that share a tile."""
    if outer >= _PLENTY:
        return 2, 4
    return (2 if is_gated or tokens > 16 else 1), 8
