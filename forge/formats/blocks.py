"""What the blocks of ggml's types hold: codes of weights, and scales of groups of them.

Layouts: ggml-common.h and ggml-quants.c of ggml. In this file n counts blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Planes(NamedTuple):
    """Unpacked blocks: a weight is scale * code, plus or minus the offset, with one scale per group of equal size."""

    codes: NDArray[np.uint8] | NDArray[np.int8]  # (n, block_size)
    scale: Floats  # (n, groups)
    offset: Floats | None = None  # (n, groups)


def field(blocks: Bytes, start: int, stop: int) -> Bytes:
    """Bytes start:stop of every block, copied as whole items: ten times as fast as a copy byte by byte."""
    items: Bytes = np.ascontiguousarray(blocks[:, start:stop].view(f"V{stop - start}")).view(np.uint8)
    return items


def half(blocks: Bytes, start: int) -> Floats:
    """The float16 at this offset of every block, as float32: (n, 1)."""
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)  # (n, 1)


def unpack(blocks: Bytes, start: int, stop: int, width: int, bits: int) -> Bytes:
    """The codes in bytes start:stop: a run of `width` bytes holds 8 / bits runs of codes, the lowest bits first."""
    words = field(blocks, start, stop).reshape(-1).view(np.uint32)
    mask = np.uint32(0x01010101 * ((1 << bits) - 1))
    codes = np.empty((words.size * 4 // width, 8 // bits), f"V{width}")
    for i in range(8 // bits):
        codes[:, i] = (words >> np.uint32(bits * i) & mask).view(f"V{width}")
    return codes.view(np.uint8).reshape(len(blocks), -1)


def join(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """low | high << bits, in place."""
    np.left_shift(high, bits, out=high)
    return np.bitwise_or(low, high, out=low)


def signed(codes: Bytes, zero: int) -> NDArray[np.int8]:
    """Codes less the code of zero."""
    return codes.view(np.int8) - np.int8(zero)


def q4_0(blocks: Bytes) -> Planes:
    """A scale and 32 codes of 4 bits around 8."""
    return Planes(signed(unpack(blocks, 2, 18, width=16, bits=4), 8), half(blocks, 0))


def q4_1(blocks: Bytes) -> Planes:
    """A scale, a minimum and 32 codes of 4 bits."""
    return Planes(unpack(blocks, 4, 20, width=16, bits=4), half(blocks, 0), half(blocks, 2))


def _five_bits(blocks: Bytes, start: int) -> Bytes:
    """32 fifth bits in 4 bytes, then 16 bytes of nibbles."""
    high = np.unpackbits(field(blocks, start, start + 4), axis=-1, bitorder="little")
    return join(unpack(blocks, start + 4, start + 20, width=16, bits=4), high, 4)


def q5_0(blocks: Bytes) -> Planes:
    """A scale and 32 codes of 5 bits around 16."""
    return Planes(signed(_five_bits(blocks, 2), 16), half(blocks, 0))


def q5_1(blocks: Bytes) -> Planes:
    """A scale, a minimum and 32 codes of 5 bits."""
    return Planes(_five_bits(blocks, 4), half(blocks, 0), half(blocks, 2))


def q8_0(blocks: Bytes) -> Planes:
    """A scale and 32 bytes."""
    return Planes(field(blocks, 2, 34).view(np.int8), half(blocks, 0))


def q2_k(blocks: Bytes) -> Planes:
    """16 groups of codes of 2 bits: scales and minima of 4 bits, and those of the block."""
    scales = blocks[:, :16]
    codes = unpack(blocks, 16, 80, width=32, bits=2)
    return Planes(codes, half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4))


def q3_k(blocks: Bytes) -> Planes:
    """16 groups of codes of 3 bits around 4: scales of 6 bits around 32, and that of the block."""
    codes = join(unpack(blocks, 32, 96, width=32, bits=2), unpack(blocks, 0, 32, width=32, bits=1), 2)
    scales = join(unpack(blocks, 96, 104, width=8, bits=4), unpack(blocks, 104, 108, width=4, bits=2), 4)
    return Planes(signed(codes, 4), half(blocks, 108) * signed(scales, 32))


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima (n, 8) of Q4_K and Q5_K: 8 + 8 numbers of 6 bits in bytes 4:16."""
    low, minimum, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.hstack([low & 63, rest & 15 | low >> 2 & 48])
    offset = np.hstack([minimum & 63, rest >> 4 | minimum >> 2 & 48])
    return half(blocks, 0) * scale, half(blocks, 2) * offset


def q4_k(blocks: Bytes) -> Planes:
    """8 groups of codes of 4 bits."""
    return Planes(unpack(blocks, 16, 144, width=32, bits=4), *_k_scales(blocks))


def q5_k(blocks: Bytes) -> Planes:
    """8 groups of codes of 5 bits."""
    codes = join(unpack(blocks, 48, 176, width=32, bits=4), unpack(blocks, 16, 48, width=32, bits=1), 4)
    return Planes(codes, *_k_scales(blocks))


def q6_k(blocks: Bytes) -> Planes:
    """16 groups of codes of 6 bits around 32: scales of 8 bits, and that of the block."""
    codes = join(unpack(blocks, 0, 128, width=64, bits=4), unpack(blocks, 128, 192, width=32, bits=2), 4)
    return Planes(signed(codes, 32), half(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _pairs(values: NDArray[np.int8]) -> NDArray[np.uint16]:
    """Two codes at a time: a code pair (low byte, high byte), read as one uint16, to its two of 16 values."""
    pairs = np.zeros((16, 256, 2), np.int8)
    pairs[:, :16, 0] = values
    pairs[:, :16, 1] = values[:, None]
    return pairs.view("<u2").reshape(-1)


def _of_pairs(pairs: NDArray[np.uint16], codes: Bytes) -> NDArray[np.int8]:
    return pairs.take(codes.view("<u2"), mode="clip").view(np.int8)


_NONLINEAR = _pairs(np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8))


def iq4_nl(blocks: Bytes) -> Planes:
    """A scale and 32 codes of 16 numbers."""
    return Planes(_of_pairs(_NONLINEAR, unpack(blocks, 2, 18, width=16, bits=4)), half(blocks, 0))


def iq4_xs(blocks: Bytes) -> Planes:
    """8 groups of codes of 16 numbers: scales of 6 bits around 32, and that of the block."""
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & np.uint8(15)).reshape(-1, 8)
    high = (blocks[:, 2:4].view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    codes = _of_pairs(_NONLINEAR, unpack(blocks, 8, 136, width=16, bits=4))
    return Planes(codes, half(blocks, 0) * signed(join(low, high, 4), 32))


_E2M1 = _pairs(np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8))


def mxfp4(blocks: Bytes) -> Planes:
    """Codes are E2M1 doubled, so scales are halves of E8M0: 2 ** (byte - 128)."""
    exponent = blocks[:, :1].astype(np.uint32)
    scale = np.where(exponent < 2, np.uint32(0x00200000) << exponent, exponent - np.uint32(1) << np.uint32(23))
    return Planes(_of_pairs(_E2M1, unpack(blocks, 1, 17, width=16, bits=4)), scale.view(np.float32))


def q1_0(blocks: Bytes) -> Planes:
    """A scale and the signs of 128 weights."""
    bits = np.unpackbits(field(blocks, 2, 18), bitorder="little").reshape(len(blocks), -1)
    return Planes(signed(np.left_shift(bits, 1, out=bits), 1), half(blocks, 0))


def q2_0(blocks: Bytes) -> Planes:
    """A scale and 64 codes of 2 bits around 1, four neighbours in a byte."""
    codes = blocks[:, 2:18, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    own: Bytes = codes.reshape(len(blocks), -1)
    return Planes(signed(own, 1), half(blocks, 0))


def q4_g(blocks: Bytes) -> Planes:
    """A scale, a code of zero in 16 bits, and 32 or 128 codes of 4 bits around it."""
    codes = unpack(blocks, 4, blocks.shape[1], width=16, bits=4).view(np.int8)
    return Planes(np.subtract(codes, blocks[:, 2:3].view(np.int8), out=codes), half(blocks, 0))
