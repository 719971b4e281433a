"""Matrices of GPTQ, AWQ, compressed-tensors and their kin: codes of 4 bits, a scale and a code of zero for each group.

A weight is scale * (code - zero). Here they become blocks of Q4_G32 and Q4_G128, forge's own types, of which that is
exact in float32. A block is the scale, float16, the zero, 16 bits, and for each 32 codes 16 bytes: the first 16 codes
in their low halves, the others above.

Layouts, of a matrix of N rows of K weights and groups of G in a row. Eight codes are a word of 32 bits, the first in
its lowest bits, but for AWQ, whose words hold the columns 0, 2, 4, 6, 1, 3, 5, 7.

- GPTQ: qweight (K / 8, N), qzeros (K / G, N / 8), scales (K / G, N), g_idx (K,), the group of each column. Zeros are
  stored less 1, except in "gptq_v2". Source: AutoGPTQ's `nn_modules/qlinear/qlinear_cuda.py`; GPTQModel for v2.
- AWQ: qweight (K, N / 8), qzeros (K / G, N / 8), scales (K / G, N). Source: AutoAWQ's `modules/linear/gemm.py`.
- compressed-tensors, pack-quantized: weight_packed (N, K / 8), weight_scale (N, K / G), weight_zero_point
  (N / 8, K / G), or without one 8. Source: its `compressors/pack_quantized/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.ggml import GGMLType, row_bytes

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each four bits of a word, the lowest first."""
_NATURAL = (0, 1, 2, 3, 4, 5, 6, 7)
_STEP_WEIGHTS = 1 << 21
"""Weights that are unpacked at a time."""
_RUN_BYTES, _NARROW = 4096, 32
"""Less than half of a stored row is read alone if it has so many bytes, or is a part so small; else with all others,
because many short reads hold threads up."""
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Stored:
    """An array of two dimensions (or one) in a file: safetensors' name of its dtype, and what fills an array with its
    bytes from a byte on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, NDArray[Any]], None]

    def box(self, rows: range, cols: range) -> NDArray[Any]:
        """Some columns of some rows, as numbers of the dtype; BF16 as uint16."""
        item = np.dtype({"I32": "<u4", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}[self.dtype])
        width = self.shape[1]
        run = len(cols) * item.itemsize
        if 2 * len(cols) <= width and (run >= _RUN_BYTES or len(cols) * _NARROW < width):
            out = np.empty((len(rows), len(cols)), item)
            for row, part in zip(rows, out, strict=True):
                self.read((row * width + cols.start) * item.itemsize, part)
            return out
        whole = np.empty((len(rows), width), item)
        self.read(rows.start * width * item.itemsize, whole)
        return whole[:, cols.start : cols.stop]


@dataclass(frozen=True, slots=True)
class _Codes:
    """Codes of 4 bits (rows, cols) in words. is_transposed: They are stored (cols, rows). packs_rows: A word is of
    eight rows, not of eight columns. order: The row or column of each four bits of a word."""

    array: Stored
    is_transposed: bool
    packs_rows: bool
    order: tuple[int, ...] = _NATURAL

    def read(self, rows: range, cols: range) -> Bytes:
        """uint8 (len(rows), len(cols))."""
        packed, first = (rows, rows.start % 8) if self.packs_rows else (cols, cols.start % 8)
        words = range(packed.start // 8, -(-packed.stop // 8))
        of_rows, of_cols = (words, cols) if self.packs_rows else (rows, words)
        found = self.array.box(of_cols, of_rows).T if self.is_transposed else self.array.box(of_rows, of_cols)
        found = np.ascontiguousarray(found)
        if not self.packs_rows:
            return _spread(found).view(np.uint8)[:, first : first + len(cols)]
        codes = np.empty((len(words), 8, len(cols)), np.uint8)
        for place, row in enumerate(self.order):
            np.copyto(codes[:, row], found >> np.uint32(4 * place) & np.uint32(15), casting="unsafe")
        return codes.reshape(-1, len(cols))[first : first + len(rows)]


def _spread(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Eight codes as eight bytes."""
    found = words.astype(np.uint64)
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        found |= found << np.uint64(shift)
        found &= np.uint64(mask)
    return found


@dataclass(frozen=True, slots=True)
class Int4:
    """A matrix (rows, cols) in a file, as rows of blocks of `type`.

    where: What errors begin with. group: Weights that share a scale. zeros: Of each group, or without any 8. more: What
    is added to them.
    """

    where: str
    type: GGMLType
    shape: tuple[int, int]
    group: int
    codes: _Codes
    scales: Stored
    scales_transposed: bool
    zeros: _Codes | None
    more: int

    def read(self, start: int, out: Bytes) -> None:
        """Fill `out`, uint8 (rows, row_bytes), with rows from `start` on. Threads may call it.

        Raises FormatError for scales beyond float16.
        """
        rows, groups, size = range(start, start + len(out)), range(self.shape[1] // self.group), self.type.block_size
        blocks = out.reshape(len(out), -1, self.type.type_size)  # (R, K / size, bytes)
        found = self.scales.box(groups, rows).T if self.scales_transposed else self.scales.box(rows, groups)
        try:
            scales = _halves(_numbers(np.ascontiguousarray(found), self.scales.dtype))
        except ParameterError as error:
            raise FormatError(f"{self.where}: {error}") from None
        zeros = None if self.zeros is None else self.zeros.read(rows, groups)
        if zeros is None:
            zeros = np.full((len(out), len(groups)), 8, np.uint8)
        _store_factors(blocks, scales, zeros + np.uint8(self.more))
        step = max(_STEP_WEIGHTS // max(len(out), 1) // size, 1) * size
        for first in range(0, self.shape[1], step):
            cols = range(first, min(first + step, self.shape[1]))
            _store_codes(blocks[:, cols.start // size : cols.stop // size], self.codes.read(rows, cols))


def pack(codes: Bytes, scales: NDArray[np.floating[Any]], zeros: Bytes | None = None) -> tuple[GGMLType, Bytes]:
    """The type and the blocks, uint8 (N, row_bytes), of weights scale * (code - zero).

    codes: uint8 (N, K), 0 to 15. scales: (N, K / G), rounded to float16. zeros: uint8 (N, K / G), or None for 8.
    Raises UnsupportedError for groups that are no multiple of 32, ParameterError for a scale beyond float16.
    """
    rows, cols = codes.shape
    groups = scales.shape[1]
    if not groups or cols % groups:
        raise ParameterError(f"scales: {groups} of a row of {cols} weights", parameter="scales")
    type = type_of(cols // groups)
    blocks = np.empty((rows, cols // type.block_size, type.type_size), np.uint8)
    _store_factors(blocks, _halves(scales), np.full(scales.shape, 8, np.uint8) if zeros is None else zeros)
    _store_codes(blocks, codes)
    return type, blocks.reshape(rows, -1)


def type_of(group: int) -> GGMLType:
    """The type whose blocks hold groups of so many weights, whole or in parts; UnsupportedError where none does."""
    for type in (GGMLType.Q4_G128, GGMLType.Q4_G32):
        if group > 0 and group % type.block_size == 0:
            return type
    raise UnsupportedError(f"groups of {group} weights have no kernels: multiples of 32 have")


def _store_factors(blocks: Bytes, scales: NDArray[np.float16], zeros: Bytes) -> None:
    """Scales and zeros (R, groups) of blocks (R, K / size, bytes), of which a group has one or more."""
    each = blocks.shape[1] // scales.shape[1]
    factors = np.empty((*scales.shape, 2), "<u2")
    factors[..., 0], factors[..., 1] = scales.view(np.uint16), zeros
    blocks[..., :4] = np.repeat(factors.view(np.uint8), each, axis=1)


def _store_codes(blocks: Bytes, codes: Bytes) -> None:
    """Codes (R, weights) of blocks (R, weights / size, bytes)."""
    eights = np.ascontiguousarray(codes).view(np.uint64).reshape(len(codes), -1, 2, 2)  # (R, weights / 32, halves, 2)
    pairs = eights[:, :, 0] | eights[:, :, 1] << np.uint64(4)
    blocks[..., 4:] = pairs.view(np.uint8).reshape(*blocks.shape[:2], -1)


def _numbers(found: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers of a file as NumPy has them."""
    return (found.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype == "BF16" else found


def _halves(scales: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if (np.isinf(halves) & np.isfinite(scales)).any():
        raise ParameterError("scales: beyond float16", parameter="scales")
    return halves


# Of files


def gptq(where: str, arrays: dict[str, Stored], group: int, *, is_v2: bool) -> Int4:
    """A matrix of GPTQ from `qweight`, `qzeros`, `scales` and, where there is one, `g_idx`.

    where: What errors begin with, the file and the matrix. group: Of the configuration; -1 for one of all columns.
    Raises FormatError for arrays that do not belong together, UnsupportedError for columns in another order.
    """
    weight, zeros, scales = (_array(where, arrays, name) for name in ("qweight", "qzeros", "scales"))
    shape = weight.shape[1], 8 * weight.shape[0]
    found = _checked(where, shape, group)
    groups = shape[1] // found
    _expect(where, zeros, (groups, _eighth(where, shape[0])))
    _expect(where, scales, (groups, shape[0]))
    if "g_idx" in arrays:
        _check_order(where, arrays["g_idx"], shape[1], found)
    codes, packed = _Codes(weight, True, False), _Codes(zeros, True, True)
    return Int4(where, type_of(found), shape, found, codes, scales, True, packed, 0 if is_v2 else 1)


def awq(where: str, arrays: dict[str, Stored], group: int) -> Int4:
    """A matrix of AWQ ("gemm") from `qweight`, `qzeros` and `scales`. Arguments and errors as of `gptq`."""
    weight, zeros, scales = (_array(where, arrays, name) for name in ("qweight", "qzeros", "scales"))
    shape = 8 * weight.shape[1], weight.shape[0]
    found = _checked(where, shape, group)
    groups = shape[1] // found
    _expect(where, zeros, (groups, weight.shape[1]))
    _expect(where, scales, (groups, shape[0]))
    codes, packed = (_Codes(array, True, True, AWQ_ORDER) for array in (weight, zeros))
    return Int4(where, type_of(found), shape, found, codes, scales, True, packed, 0)


def compressed(where: str, arrays: dict[str, Stored], group: int, *, has_zeros: bool = False) -> Int4:
    """A matrix of compressed-tensors from `weight_packed`, `weight_scale` and, where there is one,
    `weight_zero_point`. has_zeros: Whether it must have that one; vLLM takes none beside codes that are symmetric.
    Other arguments and errors as of `gptq`."""
    weight, scales = (_array(where, arrays, name) for name in ("weight_packed", "weight_scale"))
    shape = weight.shape[0], 8 * weight.shape[1]
    found = _checked(where, shape, group)
    groups = shape[1] // found
    _expect(where, scales, (shape[0], groups))
    packed = None
    if "weight_zero_point" in arrays and not has_zeros:
        raise FormatError(f"{where}: has weight_zero_point, and config.json says symmetric")
    if has_zeros:
        zeros = _array(where, arrays, "weight_zero_point")
        _expect(where, zeros, (_eighth(where, shape[0]), groups))
        packed = _Codes(zeros, False, True)
    if "weight_g_idx" in arrays:
        _check_order(where, arrays["weight_g_idx"], shape[1], found)
    return Int4(where, type_of(found), shape, found, _Codes(weight, False, False), scales, False, packed, 0)


def _array(where: str, arrays: dict[str, Stored], name: str) -> Stored:
    if name not in arrays:
        raise FormatError(f"{where}: {name} is missing")
    array = arrays[name]
    wanted = _SCALES if "scale" in name else ("I32",)
    if array.dtype not in wanted or len(array.shape) != 2 or 0 in array.shape:
        message = f"{where}: {name} is {array.dtype} {array.shape}, not two dimensions of {' or '.join(wanted)}"
        raise FormatError(message)
    return array


def _checked(where: str, shape: tuple[int, int], group: int) -> int:
    """Weights of a group."""
    found = shape[1] if group == -1 else group
    if found <= 0 or shape[1] % found:
        raise FormatError(f"{where}: has rows of {shape[1]} weights, which are no groups of {found}")
    try:
        row_bytes(type_of(found), shape[1])
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None
    return found


def _eighth(where: str, count: int) -> int:
    if count % 8:
        raise FormatError(f"{where}: has {count} rows, no multiple of 8")
    return count // 8


def _expect(where: str, array: Stored, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise FormatError(f"{where}: {array.name} has shape {array.shape}, not {shape}")


def _check_order(where: str, array: Stored, cols: int, group: int) -> None:
    """Columns are in the order of their groups."""
    _expect(where, array, (cols,))
    if array.dtype != "I32":
        raise FormatError(f"{where}: {array.name} is {array.dtype}, not I32")
    found = np.empty(cols, "<i4")
    array.read(0, found)
    if (found < 0).any() or (found >= cols // group).any():
        raise FormatError(f"{where}: {array.name} names groups that are not there: there are {cols // group}")
    if (found != np.arange(cols) // group).any():
        message = f"{where}: its columns are not in the order of their groups (desc_act), which no kernel multiplies"
        raise UnsupportedError(message, hint="take a checkpoint with desc_act false")
