"""Weights that are stored as few bits with scales beside them: FP8 becomes float32, MXFP4 ggml's blocks of the same."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from forge.checkpoints.views import STEP_BYTES, TYPES, Stored, View
from forge.errors import FormatError
from forge.formats.blocks import Bytes
from forge.formats.ggml import GGMLType
from forge.formats.safetensors import SafeTensors
from forge.formats.source import show

SCALE_BLOCK = 128
"""Rows and columns that share a scale, where they are not all of the matrix's or all of a row's."""


def _e4m3() -> NDArray[np.float32]:
    """The number of each byte: a sign, 4 bits of exponent around 7, 3 of fraction; no infinities (OCP's FP8)."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    sizes = np.where(exponents == 0, fractions / 8 * 2.0**-6, (1 + fractions / 8) * 2.0 ** (exponents - 7.0))
    sizes[codes & 127 == 127] = np.nan
    return np.where(codes >> 7, -sizes, sizes).astype(np.float32)


_E4M3 = _e4m3()


class Fp8(View):
    """FP8 E4M3 times scales, float32: (..., R, C) with one scale, or (..., R, 1), or one for each block of a matrix.

    The products are those that transformers computes, as exact as float32 holds them.
    """

    type = GGMLType.F32

    def __init__(self, files: SafeTensors, name: str, scale: str) -> None:
        """Raises FormatError where the scales do not fit the weights."""
        info, scales = files.tensors[name], files.tensors[scale]
        if not info.nbytes or len(info.shape) < 2:
            raise FormatError(f"{files.path_of(name)}: tensor {show(name)} should be a matrix, not {info.shape}")
        if scales.dtype not in TYPES or not scales.nbytes:
            raise FormatError(f"{files.path_of(scale)}: tensor {show(scale)} holds {scales.dtype} numbers, not scales")
        self._files, self._name, self.shape = files, name, info.shape
        *more, rows, cols = info.shape
        shape = scales.shape
        if prod(shape) == 1:
            shape = (*[1] * len(more), 1, 1)
        elif shape in (tuple(info.shape[:-1]), (*info.shape[:-1], 1)):  # one for each row
            shape = (*more, rows, 1)
        blocks = -(-rows // SCALE_BLOCK), -(-cols // SCALE_BLOCK)
        if len(shape) != len(info.shape) or shape[-2:] not in ((1, 1), (rows, 1), blocks):
            raise FormatError(
                f"{files.path_of(scale)}: tensor {show(scale)} has shape {scales.shape}, which does not fit "
                f"{info.shape}"
            )
        if any(found not in (1, side) for found, side in zip(shape, more, strict=False)):
            raise FormatError(f"{files.path_of(scale)}: tensor {show(scale)} has scales for another number of matrices")
        self._scales, self._scale_shape = Stored(files, scale), shape
        self._kept: NDArray[np.float32] | None = None

    def read(self, start: int, out: Bytes) -> None:
        if self._kept is None:  # another thread may do so as well
            whole = np.broadcast_to(self._scales.floats().reshape(self._scale_shape), self._full_scales())
            self._kept = np.ascontiguousarray(whole).reshape(-1, whole.shape[-1])
        rows, cols = self.shape[-2:]
        row_of, step = self._scale_shape[-2], max(STEP_BYTES // (4 * cols), 1)
        floats = out.view(np.float32)
        for first in range(0, len(out), step):
            part = floats[first : first + step]
            codes = np.empty(part.shape, np.uint8)
            self._files.read(self._name, (start + first) * cols, codes)
            numbers = np.arange(start + first, start + first + len(part))
            within = numbers % rows
            place = within if row_of == rows else within // SCALE_BLOCK if row_of > 1 else np.zeros_like(within)
            scales = self._kept[numbers // rows * row_of + place]
            if scales.shape[1] > 1:
                scales = np.repeat(scales, SCALE_BLOCK, axis=1)[:, :cols]
            np.take(_E4M3, codes, out=part)
            part *= scales

    def _full_scales(self) -> tuple[int, ...]:
        return (*self.shape[:-2], *self._scale_shape[-2:])


class Mxfp4(View):
    """MXFP4 as gpt-oss stores it, bytes of two neighbours and scales apart, in ggml's blocks: the same bits elsewhere.

    A block holds the scale and 16 bytes, of which each has the number i in its low and i + 16 in its high half.
    """

    type = GGMLType.MXFP4

    def __init__(self, files: SafeTensors, blocks: str, scales: str) -> None:
        """blocks: U8 (..., C / 32, 16). scales: U8 (..., C / 32), powers of two around 127. Raises FormatError."""
        found, of_scales = files.tensors[blocks], files.tensors[scales]
        if found.shape != (*of_scales.shape, 16) or not found.nbytes or len(found.shape) < 3:
            raise FormatError(
                f"{files.path_of(blocks)}: tensor {show(blocks)} has shape {found.shape}, "
                f"and its scales {of_scales.shape}"
            )
        if of_scales.dtype != "U8":
            raise FormatError(f"{files.path_of(scales)}: tensor {show(scales)} holds {of_scales.dtype} numbers, not U8")
        self._files, self._blocks, self._scales = files, blocks, scales
        self._per_row = of_scales.shape[-1]
        self.shape = (*of_scales.shape[:-1], 32 * self._per_row)

    def read(self, start: int, out: Bytes) -> None:
        step = self.step()
        for first in range(0, len(out), step):
            part = out[first : first + step].reshape(-1, 17)
            place = (start + first) * self._per_row
            codes, scales = np.empty((len(part), 16), np.uint8), np.empty(len(part), np.uint8)
            self._files.read(self._blocks, 16 * place, codes)
            self._files.read(self._scales, place, scales)
            numbers = np.stack((codes & 15, codes >> 4), axis=-1).reshape(-1, 32)
            part[:, 0] = scales
            part[:, 1:] = numbers[:, :16] | numbers[:, 16:] << 4
