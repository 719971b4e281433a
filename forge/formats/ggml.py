"""ggml block types and their dequantization to float32, bit for bit what the `gguf` package computes.

A chunk of blocks is unpacked at a time,
so that temporaries stay in the L2 cache, and below the 128 KiB from which malloc maps fresh pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from math import prod
from typing import Self

import numpy as np

from forge.errors import ParameterError, UnsupportedError
from forge.formats import blocks, codebooks
from forge.formats.blocks import Bytes, Floats, Planes

CHUNK_WEIGHTS = 1 << 16


class GGMLType(IntEnum):
    """Tensor types of GGUF files and two of forge: the number in the file, weights per block, bytes per block.

    A copy of the `gguf` package's tables (a test compares them): importing that package costs 35 ms, this file 1 ms.
    """

    block_size: int
    type_size: int

    def __new__(cls, value: int, block_size: int, type_size: int) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.block_size = block_size
        member.type_size = type_size
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18
    Q4_G32 = 1000, 32, 20
    Q4_G128 = 1001, 128, 68

    @property
    def in_files(self) -> bool:
        """Whether GGUF has the type. Those from 1000 on are forge's own: matrices of GPTQ and AWQ, `formats.int4`."""
        return self < 1000


TYPE_OF_NUMBER = {int(type): type for type in GGMLType if type.in_files}


def row_bytes(type: GGMLType, cols: int) -> int:
    """Bytes of a row of `cols` weights; ParameterError where `cols` is no multiple of the block size."""
    if cols % type.block_size:
        message = f"cols: {cols} is no multiple of {type.name}'s block of {type.block_size}"
        raise ParameterError(message, parameter="cols")
    return cols // type.block_size * type.type_size


def nbytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape`, slowest dimension first."""
    return prod(shape[:-1]) * row_bytes(type, shape[-1])


def dequantize(blocks: Bytes, type: GGMLType, out: Floats | None = None) -> Floats:
    """The float32 weights (rows, cols) of `blocks`, uint8 (rows, row_bytes), written to `out` where it is given.

    Safe to call from several threads on different rows. UnsupportedError for a type without a dequantizer.
    """
    rows, width = blocks.shape
    if blocks.dtype != np.uint8 or width % type.type_size:
        raise ParameterError(
            f"blocks: {blocks.dtype} rows of {width} are not {type.name} blocks of {type.type_size} bytes",
            parameter="blocks",
        )
    shape = rows, width // type.type_size * type.block_size
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        message = f"out: expected C-contiguous float32 {shape}, not {out.dtype} {out.shape}"
        raise ParameterError(message, parameter="out")
    convert = _converter(type)
    source = np.ascontiguousarray(blocks).reshape(-1, type.type_size)
    target = out.reshape(-1, type.block_size)
    step = CHUNK_WEIGHTS // type.block_size
    with np.errstate(all="ignore"):  # a file may hold infinite scales; what to do about them is the reader's business
        for start in range(0, len(source), step):
            convert(source[start : start + step], target[start : start + step])
    return out


def _converter(type: GGMLType) -> Callable[[Bytes, Floats], None]:
    """What writes blocks of a type as float32."""
    if format := BLOCK_FORMATS.get(type):
        return partial(_expand, format)
    return _FLOATS.get(type) or partial(_by_gguf, type)


def _expand(format: BlockFormat, blocks: Bytes, out: Floats) -> None:
    codes, scale, offset = format.unpack(blocks)
    np.copyto(out, codes)
    groups = out.reshape(scale.size, -1)
    np.multiply(scale.reshape(-1, 1), groups, out=groups)
    if offset is not None:
        format.combine(groups, offset.reshape(-1, 1), out=groups)


def _float(dtype: str, blocks: Bytes, out: Floats) -> None:
    np.copyto(out, blocks.view(dtype))


def _f16(blocks: Bytes, out: Floats) -> None:
    """A third of the time of NumPy's conversion, to the same bits: the exponent's place is moved, and its bias by a
    product, which also makes subnormal numbers normal ones. Numbers that are not finite are left to NumPy."""
    halves, bits = blocks.view("<i2"), out.view(np.int32)
    if ((halves & np.int16(0x7C00)) == 0x7C00).any():
        _float("<f2", blocks, out)
        return
    np.copyto(bits, halves)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8fffe000: the sign's copies between are cleared
    np.multiply(out, np.float32(2**112), out=out)


def _bf16(blocks: Bytes, out: Floats) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits, blocks.view("<u2"))
    np.left_shift(bits, 16, out=bits)


def _by_gguf(type: GGMLType, blocks: Bytes, out: Floats) -> None:
    """The types that few files use: the `gguf` package's own code."""
    import gguf

    try:
        weights = gguf.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType(type.value))
    except (NotImplementedError, ValueError):  # ValueError: an older package that does not know the type
        raise UnsupportedError(f"type {type.name} cannot be converted to float32") from None
    np.copyto(out, weights.reshape(out.shape))


_FLOATS: dict[GGMLType, Callable[[Bytes, Floats], None]] = {
    GGMLType.F32: partial(_float, "<f4"),
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
}


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How the blocks of a type with kernels are laid out, unpacked, and cut into planes for a GPU."""

    unpack: Callable[[Bytes], Planes]
    halves: tuple[int, ...]
    """Offsets of the float16 scales (and minima) in a block. IQ1_M has a scale in pieces, MXFP4 a power of two."""
    weights_per_thread: int
    """Weights that a thread of a kernel reads together."""
    quants: tuple[int, int]
    high: tuple[int, int] | None = None
    """High bits of the quants, or signs, where they lie apart."""
    scales: tuple[int, int] | None = None
    """Scales of groups."""
    deltas: tuple[int, int] | None = None
    """Scales (and minima) of blocks. Together the planes are all bytes of a block, each once."""
    combine: np.ufunc = np.add
    """What is done with the offsets."""

    @property
    def planes(self) -> tuple[tuple[int, int] | None, ...]:
        """Start and end of each plane's bytes in a block: quants, high bits, group scales, block scales."""
        return self.quants, self.high, self.scales, self.deltas


BLOCK_FORMATS = {
    GGMLType.Q4_0: BlockFormat(blocks.q4_0, (0,), 32, quants=(2, 18), deltas=(0, 2)),
    GGMLType.Q4_1: BlockFormat(blocks.q4_1, (0, 2), 32, quants=(4, 20), deltas=(0, 4)),
    GGMLType.Q5_0: BlockFormat(blocks.q5_0, (0,), 32, quants=(6, 22), high=(2, 6), deltas=(0, 2)),
    GGMLType.Q5_1: BlockFormat(blocks.q5_1, (0, 2), 32, quants=(8, 24), high=(4, 8), deltas=(0, 4)),
    GGMLType.Q8_0: BlockFormat(blocks.q8_0, (0,), 32, quants=(2, 34), deltas=(0, 2)),
    GGMLType.IQ4_NL: BlockFormat(blocks.iq4_nl, (0,), 32, quants=(2, 18), deltas=(0, 2)),
    GGMLType.Q2_K: BlockFormat(
        blocks.q2_k, (80, 82), 128, quants=(16, 80), scales=(0, 16), deltas=(80, 84), combine=np.subtract
    ),
    GGMLType.Q3_K: BlockFormat(
        blocks.q3_k, (108,), 128, quants=(32, 96), high=(0, 32), scales=(96, 108), deltas=(108, 110)
    ),
    # Scales of blocks and of groups are 16 bytes that are read at once.
    GGMLType.Q4_K: BlockFormat(blocks.q4_k, (0, 2), 64, quants=(16, 144), scales=(0, 16), combine=np.subtract),
    GGMLType.Q5_K: BlockFormat(
        blocks.q5_k, (0, 2), 64, quants=(48, 176), high=(16, 48), scales=(0, 16), combine=np.subtract
    ),
    GGMLType.Q6_K: BlockFormat(
        blocks.q6_k, (208,), 64, quants=(0, 128), high=(128, 192), scales=(192, 208), deltas=(208, 210)
    ),
    GGMLType.IQ4_XS: BlockFormat(blocks.iq4_xs, (0,), 64, quants=(8, 136), scales=(2, 8), deltas=(0, 2)),
    GGMLType.MXFP4: BlockFormat(blocks.mxfp4, (), 32, quants=(1, 17), deltas=(0, 1)),
    GGMLType.Q1_0: BlockFormat(blocks.q1_0, (0,), 64, quants=(2, 18), deltas=(0, 2)),
    GGMLType.Q2_0: BlockFormat(blocks.q2_0, (0,), 64, quants=(2, 18), deltas=(0, 2)),
    GGMLType.Q4_G32: BlockFormat(blocks.q4_g, (0,), 32, quants=(4, 20), deltas=(0, 4)),
    GGMLType.Q4_G128: BlockFormat(blocks.q4_g, (0,), 32, quants=(4, 68), deltas=(0, 4)),
    # Types with a codebook: quants are numbers of entries, beside signs and scales where those are in the same words.
    GGMLType.IQ2_XXS: BlockFormat(codebooks.iq2_xxs, (0,), 64, quants=(2, 66), deltas=(0, 2)),
    GGMLType.IQ2_XS: BlockFormat(codebooks.iq2_xs, (0,), 64, quants=(2, 66), scales=(66, 74), deltas=(0, 2)),
    GGMLType.IQ2_S: BlockFormat(
        codebooks.iq2_s, (0,), 64, quants=(2, 34), high=(34, 66), scales=(66, 82), deltas=(0, 2)
    ),
    GGMLType.IQ3_XXS: BlockFormat(codebooks.iq3_xxs, (0,), 64, quants=(2, 66), high=(66, 98), deltas=(0, 2)),
    GGMLType.IQ3_S: BlockFormat(
        codebooks.iq3_s, (0,), 64, quants=(2, 66), high=(66, 106), scales=(106, 110), deltas=(0, 2)
    ),
    GGMLType.IQ1_S: BlockFormat(codebooks.iq1_s, (0,), 64, quants=(2, 34), high=(34, 50), deltas=(0, 2)),
    GGMLType.IQ1_M: BlockFormat(codebooks.iq1_m, (), 64, quants=(0, 32), high=(32, 48), scales=(48, 56)),
}
"""The types that forge's own code reads, on NumPy and in kernels. A new one is a row here and its piece of
`raw_kernels/include/quant_blocks.hip`; the other types of a file become float16 by the `gguf` package."""
