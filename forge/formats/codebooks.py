"""What the blocks of ggml's types with a codebook hold: IQ1, IQ2 and IQ3, of which 8 or 4 weights are an entry of it.

Layouts and codebooks: ggml-common.h and ggml-quants.c of ggml. In this file n counts blocks of 256 weights.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.formats.blocks import Bytes, Floats, Planes, field, half

Codes = NDArray[np.int8]


@cache
def codebook(name: str) -> Codes:
    """The numbers of each entry of a type's codebook, (entries, 8) or (entries, 4), as the kernels' source has them.

    Entries are packed there, see `raw_kernels/include/codebooks.hip`. Those of IQ1 are 8 times the weight, without its
    shift.
    """
    path = resources.files("forge") / "raw_kernels" / "include" / "codebooks.hip"
    found = re.search(rf"FORMAT == {name}\b[^{{]*{{([^}}]*)}}", path.read_text(encoding="utf-8"))
    assert found
    packed = (
        np.array([int(word, 16) for word in found[1].replace(",", " ").split()], "<u4").view(np.uint8).reshape(-1, 4)
    )
    if name.startswith("IQ3"):
        return packed.view(np.int8)
    if name.startswith("IQ2"):
        return np.array([8, 25, 43], np.int8)[np.hstack([packed & 15, packed >> 4])]
    return (np.hstack([packed, packed >> 2]) & 0x18).view(np.int8) - np.int8(8)


@cache
def _signs() -> NDArray[np.uint64]:
    """The 8 signs of a byte, the lowest bit's first, each an int8 of 1 or -1: (256,)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.ascontiguousarray(1 - 2 * bits.view(np.int8)).view(np.uint64).reshape(-1)


@cache
def _even_signs() -> NDArray[np.uint64]:
    """The 8 signs of 7 bits, with an eighth that makes the number of negative ones even: (128,)."""
    seven = np.arange(128, dtype=np.uint8)
    return _signs().take(seven | np.bitwise_count(seven) << 7)


def _take(name: str, entries: NDArray[Any], signs: NDArray[np.uint64] | None = None) -> Codes:
    """The codes of entries (n, any), in their order, with their signs: (n, 256)."""
    book = codebook(name)
    codes = (
        book.view(f"V{book.shape[1]}").reshape(-1).take(entries, mode="clip").view(np.int8).reshape(len(entries), -1)
    )
    return codes if signs is None else np.multiply(codes, signs.view(np.int8).reshape(codes.shape), out=codes)


def _nibbles(bytes: Bytes) -> Bytes:
    """(n, b) as (n, 2 b): the low half of each byte, then its high half."""
    return (bytes[:, :, None] >> np.array([0, 4], np.uint8) & np.uint8(15)).reshape(len(bytes), -1)


def _with_high(low: Bytes, high: NDArray[Any], bits: int, shifts: tuple[int, ...]) -> NDArray[np.uint16]:
    """Numbers of entries (n, low bytes): some numbers of so many high bits are in each item of `high`."""
    parts = high[:, :, None] >> np.array(shifts, high.dtype) & high.dtype.type((1 << bits) - 1)
    above: NDArray[np.uint16] = parts.astype(np.uint16).reshape(low.shape) << np.uint16(8)
    return low | above


def _scale(blocks: Bytes, numbers: NDArray[Any], factor: float) -> Floats:
    """Scales of groups, whose numbers are (n, groups): float16 of the block * (number + 1/2) * factor."""
    return np.multiply(half(blocks, 0) * (np.float32(0.5) + numbers), np.float32(factor), dtype=np.float32)


def _of_even(blocks: Bytes, start: int, step: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Signs (n, 32) of four times 7 bits in words `step` apart, and the 4 bits above them, (n, 8)."""
    words = field(blocks, start, len(blocks[0])).view("<u4").reshape(len(blocks), -1)[:, ::step]
    seven = words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & np.uint32(127)
    return _even_signs().take(seven, mode="clip").reshape(len(blocks), -1), words >> np.uint32(28)


def iq2_xxs(blocks: Bytes) -> Planes:
    """8 groups: entries of 8 bits, 7 bits of signs, and a scale of 4 bits."""
    signs, scales = _of_even(blocks, 6, 2)
    entries = field(blocks, 2, 66).reshape(len(blocks), 8, 8)[:, :, :4].reshape(len(blocks), -1)
    return Planes(_take("IQ2_XXS", entries, signs), _scale(blocks, scales.astype(np.float32), 0.25))


def iq2_xs(blocks: Bytes) -> Planes:
    """Entries of 9 bits with 7 bits of signs, 16 groups with scales of 4 bits."""
    both = field(blocks, 2, 66).view("<u2").reshape(len(blocks), -1)
    signs = _even_signs().take(both >> np.uint16(9), mode="clip")
    return Planes(_take("IQ2_XS", both & np.uint16(511), signs), _scale(blocks, _nibbles(blocks[:, 66:74]), 0.25))


def iq2_s(blocks: Bytes) -> Planes:
    """Entries of 10 bits, all signs, 16 groups with scales of 4 bits."""
    entries = _with_high(blocks[:, 2:34], blocks[:, 66:74], 2, (0, 2, 4, 6))
    codes = _take("IQ2_S", entries, _signs().take(blocks[:, 34:66], mode="clip"))
    return Planes(codes, _scale(blocks, _nibbles(blocks[:, 74:82]), 0.25))


def iq3_xxs(blocks: Bytes) -> Planes:
    """Entries of 8 bits, 7 bits of signs of 8 weights, 8 groups with scales of 4 bits."""
    signs, scales = _of_even(blocks, 66, 1)
    return Planes(_take("IQ3_XXS", blocks[:, 2:66], signs), _scale(blocks, scales.astype(np.float32), 0.5))


def iq3_s(blocks: Bytes) -> Planes:
    """Entries of 9 bits, all signs, 8 groups with scales of 4 bits."""
    entries = _with_high(blocks[:, 2:66], blocks[:, 66:74], 1, tuple(range(8)))
    codes = _take("IQ3_S", entries, _signs().take(blocks[:, 74:106], mode="clip"))
    return Planes(codes, half(blocks, 0) * (1 + 2 * _nibbles(blocks[:, 106:110])))


def _shifted(codes: Codes, is_less: NDArray[np.bool_]) -> Codes:
    """IQ1's codes, 8 times the weights: 1 less in some groups, of equal size, and 1 more in the others."""
    groups = codes.reshape(is_less.size, -1)
    np.add(groups, np.where(is_less, np.int8(-1), np.int8(1)).reshape(-1, 1), out=groups)
    return codes


def iq1_s(blocks: Bytes) -> Planes:
    """Entries of 11 bits, 8 groups with a shift and a scale of 3 bits."""
    high = field(blocks, 34, 50).view("<u2").reshape(len(blocks), -1)
    entries = _with_high(blocks[:, 2:34], high, 3, (0, 3, 6, 9))
    scale = half(blocks, 0) * (2 * (high >> np.uint16(12) & np.uint16(7)) + 1)
    return Planes(_shifted(_take("IQ1_S", entries), high >= 0x8000), scale * np.float32(0.125))


def iq1_m(blocks: Bytes) -> Planes:
    """The block's scale is in the highest four bits of four words, whose others are the groups' scales."""
    high, words = _nibbles(blocks[:, 32:48]), field(blocks, 48, 56).view("<u2").reshape(len(blocks), -1)
    entries = blocks[:, :32] | (high & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    parts = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    delta = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view("<f2").astype(np.float32)
    numbers = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)).reshape(len(blocks), -1)
    codes = _shifted(_take("IQ1_M", entries), high >= 8)
    return Planes(codes, delta * (2 * numbers + 1) * np.float32(0.125))
