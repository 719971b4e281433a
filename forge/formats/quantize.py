"""float32 weights to the blocks of ggml's types: what `ggml.dequantize` reads.

Bit for bit what the `gguf` package computes where it has the type; `quantize_k.py` has the others. Weights lie
transposed while they are worked on, one group a column: then every step is a vector operation over many groups, and a
sum over a group adds row to row, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from forge.errors import ParameterError, UnsupportedError
from forge.formats.blocks import Bytes, Floats, half
from forge.formats.ggml import BLOCK_FORMATS, GGMLType, dequantize, row_bytes
from forge.formats.quantize_k import extreme, k_minimum, q6_k
from forge.formats.scratch import scratch

_CHUNK_GROUPS = 4128
"""Groups of 32 weights that are worked on together: what it costs to begin an operation counts little, and of long ones
threads seldom wait for Python's lock. K types, of many operations, take twice as many. Columns are no power of two
apart: such columns would share few lines of the cache."""
REFUSED = "weights are not finite, or too large for {}"


def quantize(rows: Floats, type: GGMLType, out: Bytes | None = None) -> Bytes:
    """The blocks, uint8 (rows, row_bytes), of float32 weights (rows, cols); written to `out` where it is given.

    Safe to call from several threads on different rows. Where all weights of a block are so small that the inverse of
    its scale is infinite, they become zeros. Raises UnsupportedError for a type that nothing here writes, and for
    weights that are not finite or too large for the type's scales.
    """
    if rows.ndim != 2 or rows.dtype != np.float32:
        raise ParameterError(f"rows: expected float32 (rows, cols), not {rows.dtype} {rows.shape}", parameter="rows")
    shape = len(rows), row_bytes(type, rows.shape[1])
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        message = f"out: expected C-contiguous uint8 {shape}, not {out.dtype} {out.shape}"
        raise ParameterError(message, parameter="out")
    fill(np.ascontiguousarray(rows).view(np.uint8), GGMLType.F32, type, out)
    if not is_sound(out, type):
        raise UnsupportedError(REFUSED.format(type.name))
    return out


def fill(source: Bytes, stored: GGMLType, type: GGMLType, out: Bytes) -> None:
    """As `quantize`, of rows as a file stores them, uint8 (rows, row_bytes). Weights that have no block give one whose
    scale is NaN or infinite: see `is_sound`."""
    if type not in QUANTIZERS:
        raise UnsupportedError(f"nothing writes blocks of type {type.name}: use one of {quantizable()}")
    group, write = QUANTIZERS[type]
    given = source.reshape(-1, stored.type_size)
    target = out.reshape(-1, type.type_size)
    weights = len(target) * type.block_size
    step = _CHUNK_GROUPS * 32 * (2 if type.block_size == 256 else 1)
    with np.errstate(all="ignore"):
        for start in range(0, weights, step):
            part = slice(start, min(start + step, weights))
            size = part.stop - start
            floats = scratch("floats", (size // stored.block_size, stored.block_size), np.float32)
            dequantize(given[start // stored.block_size : part.stop // stored.block_size], stored, floats)
            columns = scratch("columns", (group, size // group), np.float32)
            rows = floats.reshape(-1, group)
            for first in range(0, len(rows), _CHUNK_GROUPS):  # more would leave the cache between two of their columns
                some = slice(first, first + _CHUNK_GROUPS)
                np.copyto(columns[:, some], rows[some].T)
            write(columns, target[start // type.block_size : part.stop // type.block_size])


def is_sound(blocks: Bytes, type: GGMLType) -> bool:
    """Whether all weights of blocks, uint8 (rows, row_bytes), had a place in them: their scales are finite."""
    if type.block_size == 1:
        return True
    each = blocks.reshape(-1, type.type_size)
    if type is GGMLType.MXFP4:
        return not (each[:, 0] == _E8M0_NAN).any()
    return all(np.isfinite(half(each, start)).all() for start in BLOCK_FORMATS[type].halves)


def quantizable() -> str:
    """Names of the types that `quantize` writes."""
    return ", ".join(type.name for type in QUANTIZERS)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is infinite: the block is then zeros."""
    inverse: Floats = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _put_half(blocks: Bytes, start: int, values: Floats) -> None:
    """Write a number of each block (n,) as float16 at this offset."""
    blocks[:, start : start + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _put_nibbles(blocks: Bytes, start: int, codes: Bytes) -> None:
    """Write codes (32, n), the low bits alone: byte i has those of weight i and of i + 16."""
    blocks[:, start : start + 16] = ((codes[:16] & np.uint8(15)) | (codes[16:] << np.uint8(4))).T


def _put_fifth_bits(blocks: Bytes, start: int, codes: Bytes) -> None:
    """Write the fifth bits of codes (32, n) in 4 bytes, that of the first weight the lowest."""
    blocks[:, start : start + 4] = np.packbits(codes >> np.uint8(4), axis=0, bitorder="little").T


def _around_zero(bits: int, x: Floats, blocks: Bytes) -> None:
    """Q4_0 and Q5_0: the extreme weight is the lowest code, and the scale has its sign."""
    zero = 1 << bits - 1
    scale = extreme(x) / np.float32(-zero)
    x *= _inverse(scale)
    x += np.float32(zero + 0.5)
    codes = np.minimum(x.astype(np.uint8), np.uint8(2 * zero - 1))
    if bits == 5:
        _put_fifth_bits(blocks, 2, codes)
    _put_nibbles(blocks, 4 * bits - 14, codes)
    _put_half(blocks, 0, scale)


def _above_minimum(bits: int, x: Floats, blocks: Bytes) -> None:
    """Q4_1 and Q5_1: codes count steps above the least weight."""
    low, most = np.minimum.reduce(x), (1 << bits) - 1
    scale = (np.maximum.reduce(x) - low) / np.float32(most)
    x -= low
    x *= _inverse(scale)
    x += np.float32(0.5)
    codes = np.minimum(x.astype(np.uint8), np.uint8(most))
    if bits == 5:
        _put_fifth_bits(blocks, 4, codes)
    _put_nibbles(blocks, 4 * (bits - 3), codes)
    _put_half(blocks, 0, scale)
    _put_half(blocks, 2, low)


_BELOW_HALF = np.float32(0.49999997)
"""The float32 before 0.5: truncating x + this rounds x >= 0 to the nearest integer, halves up. x + 0.5 itself rounds
this number to 1."""


def _q8_0(x: Floats, blocks: Bytes) -> None:
    """Whole steps of a 127th of the largest weight, halves away from zero."""
    sign = -np.less(x, 0).view(np.int8)
    np.abs(x, out=x)
    scale = np.maximum.reduce(x) / np.float32(127)
    x *= _inverse(scale)
    x += _BELOW_HALF
    codes = x.astype(np.int8)
    codes ^= sign
    codes -= sign
    blocks[:, 2:] = codes.view(np.uint8).T
    _put_half(blocks, 0, scale)


_E8M0_NAN = 255
_E2M1_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between the neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6: a weight beyond it takes the larger one."""


def _rounding_log2() -> NDArray[np.uint32]:
    """For each exponent of a float32, how many numbers just below the next power of 2 have a float32 logarithm that
    rounds to that power's.

    The float32 below the integer n is 2**(q - 23) away, so those are where j * 2**-24 / ln 2 < 2**(q - 24).
    """
    power = np.arange(-126, 130)  # the next power of 2 for the exponents 0 to 255
    spacing = np.where(power > 0, power - 1, -power)
    q = np.log2(np.maximum(spacing, 0.25)).astype(np.int64)
    return np.where(spacing > 0, np.floor(2.0**q * np.log(2)), 0).astype(np.uint32)


_LOG2 = _rounding_log2()


def _mxfp4(x: Floats, blocks: Bytes) -> None:
    """The scale is a power of 2 by the logarithm of the largest weight, as float32 rounds it. Of two codes that are as
    near the smaller one. Weights below 2**-124, for which the formula of the scale has no byte, have the least."""
    is_negative = np.less(x, 0).view(np.uint8)
    np.abs(x, out=x)
    most = np.maximum.reduce(x)
    bits = most.view(np.uint32)
    exponent = np.maximum((bits + _LOG2[bits >> 23] >> 23).astype(np.int32) - 2, 0)
    x *= (254 - exponent << 23).astype(np.uint32).view(np.float32)  # 2**(127 - exponent), one over the scale
    codes = np.zeros(x.shape, np.uint8)
    for border in _E2M1_BORDERS:
        codes += (x > np.float32(border)).view(np.uint8)
    codes |= is_negative << np.uint8(3)
    codes *= codes != 8  # there is one zero
    blocks[:, 0] = np.where(np.isfinite(most), exponent, _E8M0_NAN)
    _put_nibbles(blocks, 1, codes)


def _f32(x: Floats, blocks: Bytes) -> None:
    np.copyto(blocks.view("<f4"), x.T)


def _f16(x: Floats, blocks: Bytes) -> None:
    halves = blocks.view("<f2")
    np.copyto(halves, x.T, casting="same_kind")
    if (np.isinf(halves) & np.isfinite(x.T)).any():
        raise UnsupportedError(REFUSED.format("F16"))


def _bf16(x: Floats, blocks: Bytes) -> None:
    """The nearest, the even one of two. A NaN becomes a quiet one."""
    bits = x.view(np.uint32)
    is_nan = np.isnan(x)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    rounded[is_nan] = (bits[is_nan] >> 16) | 64
    np.copyto(blocks.view("<u2"), rounded.T, casting="same_kind")


QUANTIZERS: dict[GGMLType, tuple[int, Callable[[Floats, Bytes], None]]] = {
    GGMLType.F32: (1, _f32),
    GGMLType.F16: (1, _f16),
    GGMLType.BF16: (1, _bf16),
    GGMLType.Q4_0: (32, partial(_around_zero, 4)),
    GGMLType.Q4_1: (32, partial(_above_minimum, 4)),
    GGMLType.Q5_0: (32, partial(_around_zero, 5)),
    GGMLType.Q5_1: (32, partial(_above_minimum, 5)),
    GGMLType.Q8_0: (32, _q8_0),
    GGMLType.MXFP4: (32, _mxfp4),
    GGMLType.Q4_K: (32, partial(k_minimum, 4)),
    GGMLType.Q5_K: (32, partial(k_minimum, 5)),
    GGMLType.Q6_K: (16, q6_k),
}
"""By type the weights of a group, and what writes the blocks of groups (weights of a group, groups), which it may
overwrite."""
