"""Launches of experts' products with many rows on Hopper."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType
from forge.ops import matmul
from forge.tuning.lds import many_lds

_CHOICE = {"TILES": 2, "BLOCK": 128, "MIN_BLOCKS": 2, "STAGES": 2}
"""TILES of 16 outputs of a wave, threads of a block that multiply, blocks of a multiprocessor, and STAGES of 256
weights in LDS. Of two blocks one multiplies while the other begins or stores."""
_WIDE_CHOICE = {"TILES": 1, "BLOCK": 256, "MIN_BLOCKS": 1, "STAGES": 2}
"""The same of tiles of 128 rows with formats whose codes take more registers."""
_WIDE_FORMATS = ("Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
_FULL = {32: 12, 64: 96}
"""Up to so many pairs of an expert on average tiles have so many rows, else 128: a product of more rows at a time is
faster, but more of them are empty."""
_ORDERED_ROWS = 64
_ORDER_BLOCK = 256
_NUMBERS_OF_THREAD = 16


def takes(device: GPU, experts: Any) -> bool:
    """Whether the kernel computes these experts: quantized, with lines of 256 weights, gates and ups together."""
    is_gated = experts.up is None and experts.gate.shape[0] == 2 * experts.count * experts.down.shape[1]
    return device.has_wgmma and is_gated and all(map(matmul.takes_orders, (experts.gate, experts.down)))


def tile_rows(total: int, count: int) -> int:
    """Rows of a tile at most, of `total` pairs of `count` experts."""
    return next((rows for rows, most in _FULL.items() if total <= most * count), 128)


def _choice(format: str, rows: int) -> dict[str, int]:
    return _WIDE_CHOICE if rows == 128 and format in _WIDE_FORMATS else _CHOICE


def multiply(
    device: GPU,
    x: Any,
    pairs: Any,
    tiles: Any,
    experts: Any,
    factors: Any,
    shares: Any,
    tokens: int,
    activation: int,
) -> Any:
    """The results of all pairs, float32 (U, M, K).

    x: act (M, K). pairs, tiles: of expert_groups, with at most `tokens` pairs of a tile. factors, shares: float32
    (M, U), of the first products and of the results, or None. activation: Its number.
    """
    (rows, inner), num_tiles, width = x.shape, tiles.shape[0], experts.down.shape[1]
    used, blocks = pairs.shape[0] // rows, -(-num_tiles * tokens // _ORDERED_ROWS)
    gathered, h = (device.empty((blocks, each // 64, _ORDERED_ROWS, 64), device.dtype) for each in (inner, width))
    grid = (-(-tokens * inner // (_NUMBERS_OF_THREAD * _ORDER_BLOCK)), num_tiles)
    halves, next_halves = (int(each.type is GGMLType.Q6_K) for each in (experts.gate, experts.down))
    device.run("reorder_x", "gather_x", grid, x, gathered, tiles, pairs, used, tokens, inner, halves)

    def run(operand: Any, weight: Any, bias: Any, scales: Any, y: Any, gated: Any) -> None:
        format, outer = weight.type.name, weight.shape[0] // experts.count
        choice = _choice(format, tokens)
        device.run(
            "expert_wgmma_quant",
            "expert_wgmma_quant",
            (-(-outer // (16 * choice["TILES"] * (choice["BLOCK"] // 32))), num_tiles),
            *(operand, tiles, pairs, scales, *weight.planes, bias, y, gated),
            *(used, rows, weight.shape[1], outer, next_halves),
            **choice,
            **many_lds(format, {**choice, "TOKENS": tokens}, 8 * tokens),
            TOKENS=tokens,
            THREADS=choice["BLOCK"] + 128,
            FORMAT=int(weight.type),
            TILE_LIST=1,
            GATED=int(gated is not None),
            ACTIVATION=activation if gated is not None else 0,
        )

    run(gathered, experts.gate, experts.gate_bias, factors, None, h)
    del gathered  # in its memory is room for the results
    parts = device.empty((used, rows, inner), np.float32)
    run(h, experts.down, experts.down_bias, shares, parts, None)
    return parts
