"""What blocks of the kernels of Hopper have of LDS."""

from __future__ import annotations

from forge.formats.ggml import BLOCK_FORMATS, GGMLType
from forge.tuning.spec import Values

TMA_TOKENS = 128
"""Rows of a product that a block of `matmul_tma` takes. More go to further blocks, two of which share the weights."""


def group_lds_bytes(tokens: int, values: Values) -> int:
    """What a block of `matmul_wgmma` has of LDS: STAGES of STAGE_STEPS times 64 numbers of each of its rows."""
    rows_of_block = 16 * values["TILES"] * values["BLOCK"] // 32
    return values["STAGES"] * values["STAGE_STEPS"] * 128 * (tokens + rows_of_block)


def tma_lds_bytes(values: Values) -> int:
    """What a block of `matmul_tma` has of LDS: STAGES of 64 numbers of each of its rows, and 1 KB for its barriers."""
    return values["STAGES"] * 128 * (128 * values["TILES"] + TMA_TOKENS) + 1024


def stage_bytes(format: str, values: Values) -> int:
    """Of STAGES of 256 weights of a block's rows of the matrix: planes with whole pieces of 16 bytes."""
    type = GGMLType[format]
    widths = (field[1] - field[0] for field in BLOCK_FORMATS[type].planes if field)
    row_bytes = sum(size for width in widths if (size := width * 256 // type.block_size) % 16 == 0)
    return values["STAGES"] * 16 * values["TILES"] * values["BLOCK"] // 32 * row_bytes


def few_lds_bytes(format: str, values: Values) -> int:
    """Of a block of `matmul_mma_quant`: its stages, and of each wave 256 numbers of 8 rows of x with the sums of 8
    groups of them, or of 16."""
    of_wave = 8 * 2 * 256 + (1024 if format == "Q6_K" else 512) + 256
    return stage_bytes(format, values) + values["BLOCK"] // 32 * of_wave


def quant_lds_bytes(format: str, tokens: int, values: Values) -> int:
    """What a block of `matmul_wgmma_quant` has of LDS: STAGES of 256 weights of its rows of the matrix, and x twice.

    Planes with whole pieces of 16 bytes in 256 weights go through LDS. Of x there are up to 4 quarters of the 256.
    """
    x_bytes = 2 * 128 * max(min(4 * tokens, 128), tokens)
    return -(-(stage_bytes(format, values) + x_bytes) // 1024) * 1024


def attention_lds_bytes(dim: int, values: Values) -> int:
    """What a block of `attention_wgmma` has of LDS: lines of 64 numbers of its queries and of STAGES of keys and
    values, and 1 KB for its barriers."""
    queries = 64 * (values["BLOCK"] // 128 - 1)
    return 128 * -(-dim // 64) * (queries + 2 * values["STAGES"] * values["KEYS"]) + 1024
