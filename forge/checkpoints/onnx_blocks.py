"""Matrices of com.microsoft's MatMulNBits and GatherBlockQuantized: codes, a scale and a zero for each block of a row.

A weight is scale * (code - zero). Codes of 4 bits lie two in a byte, the first in the low half, and so do zeros, whose
rows begin at a byte; without any they are the middle. Source: docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.checkpoints.onnx_parameters import DTYPES, Constants
from forge.checkpoints.views import STEP_BYTES, TYPES, View
from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats import int4
from forge.formats.blocks import Bytes
from forge.formats.ggml import GGMLType, dequantize
from forge.formats.onnx import Node, Tensor
from forge.formats.source import show

_SCALES = {name: TYPES[dtype] for name, dtype in DTYPES.items()}


class Blocked(View):
    """A matrix (N, K), made of its codes when its rows are read.

    Its type is that of blocks of 4 bits with zeros, or Q8_0, where a block is a multiple of 32; scales become float16.
    Else it is float32, or float16 where its scales are.
    """

    def __init__(self, node: Node, constants: Constants) -> None:
        """Raises UnsupportedError for other widths, orders and kinds of zeros, FormatError for arrays that lie."""
        self._constants, self._node = constants, node
        is_product = node.op_type == "MatMulNBits"
        self.bits, self.block = self._number("bits", 4), self._number("block_size", 0)
        codes = self._tensor(0 if not is_product else 1, ("UINT8", "UINT4"))
        if self.bits not in (4, 8):
            raise UnsupportedError(f"{self._where}: has codes of {self.bits} bits, known are 4 and 8")
        if not codes.shape:
            raise FormatError(f"{self._where}: {show(codes.name)}, its codes, is one number and no matrix")
        if is_product:
            self.shape = self._number("N", 0), self._number("K", 0)
        else:
            self._expect_number("gather_axis", 0)
            self._expect_number("quantize_axis", len(codes.shape) - 1)
            self.shape = codes.shape[0], prod(codes.shape[1:]) * (8 // self.bits if codes.type == "UINT8" else 1)
        if self.block < 16 or self.block & (self.block - 1) or min(self.shape) < 1:
            raise FormatError(f"{self._where}: a matrix {self.shape} in blocks of {self.block} is impossible")
        self.blocks = -(-self.shape[1] // self.block)
        self._row = self.blocks * self.block * self.bits // 8 if is_product else codes.nbytes // self.shape[0]
        self._check_size(codes, self.shape[0] * self._row)
        scales = self._tensor(2, tuple(DTYPES))
        self._check_size(scales, self.shape[0] * self.blocks * _SCALES[scales.type].type_size)
        zeros = self._optional(3, ("UINT8", *DTYPES))
        self._zero_row = -(-self.blocks * self.bits // 8)
        if zeros is not None and zeros.type != "UINT8":
            raise UnsupportedError(f"{self._where}: has zeros of {zeros.type}, known are those of {self.bits} bits")
        if zeros is not None:
            self._check_size(zeros, self.shape[0] * self._zero_row)
        if is_product and self._optional(4, ("INT32",)) is not None:
            raise UnsupportedError(f"{self._where}: its columns are in an order of their own (g_idx)")
        if self._number("weight_prepacked", 0):
            raise UnsupportedError(
                f"{self._where}: its codes are packed for one GPU: build the model without prepacking"
            )
        self._codes, self._scales, self._zeros = codes, scales, zeros
        self._group = self.block if self.shape[1] % self.block == 0 else 32
        """Weights that share a scale in the blocks that are made."""
        self.type = self._made_type()

    def _made_type(self) -> GGMLType:
        if self._group % 32 == 0 and self.shape[1] % self._group == 0 and self.block % self._group == 0:
            if self.bits == 4:
                return int4.type_of(self._group)
            if self._zeros is None:
                return GGMLType.Q8_0
        return GGMLType.F16 if self._scales.type == "FLOAT16" else GGMLType.F32

    def read(self, start: int, out: Bytes) -> None:
        step = max(STEP_BYTES // self.shape[1], 1)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            codes, scales, zeros = self._planes(start + first, len(part))
            if self.type in (GGMLType.F16, GGMLType.F32):
                signed = codes.astype(np.float32) - np.repeat(zeros, self._group, 1)[:, : self.shape[1]]
                weights = signed * np.repeat(scales, self._group, 1)[:, : self.shape[1]]
                part[:] = weights.astype("<f2" if self.type is GGMLType.F16 else "<f4").view(np.uint8)
            elif self.bits == 4:
                try:
                    part[:] = int4.pack(codes, scales, zeros)[1]
                except ParameterError as error:
                    raise FormatError(f"{self._where}: {error}") from None
            else:
                _store_8_bits(part, codes, scales)

    def _planes(self, start: int, count: int) -> tuple[Bytes, NDArray[np.float32], Bytes]:
        """Of some rows: codes (R, K), scales and zeros (R, groups)."""
        codes = self._spread(self._read(self._codes, start * self._row, (count, self._row)))[:, : self.shape[1]]
        kind = _SCALES[self._scales.type]
        size = self.blocks * kind.type_size
        numbers = dequantize(self._read(self._scales, start * size, (count, size)), kind)
        zeros = np.full((count, self.blocks), 1 << (self.bits - 1), np.uint8)
        if self._zeros is not None:
            packed = self._read(self._zeros, start * self._zero_row, (count, self._zero_row))
            zeros = self._spread(packed)[:, : self.blocks]
        each, groups = self.block // self._group, -(-self.shape[1] // self._group)
        return codes, np.repeat(numbers, each, 1)[:, :groups], np.repeat(zeros, each, 1)[:, :groups]

    def _spread(self, packed: Bytes) -> Bytes:
        """Codes in bytes of their own."""
        if self.bits == 8:
            return packed
        return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1).reshape(len(packed), -1)

    def _read(self, tensor: Tensor, start: int, shape: tuple[int, int]) -> Bytes:
        out = np.empty(shape, np.uint8)
        self._constants.model.read(tensor, start, out)
        return out

    @property
    def _where(self) -> str:
        return f"{self._constants.path}: {self._node.op_type} {show(self._node.name)}"

    def _number(self, name: str, default: int) -> int:
        value: Any = self._node.attributes.get(name, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise FormatError(f"{self._where}: {name} should be a whole number, not {show(repr(value))}")
        return value

    def _expect_number(self, name: str, value: int) -> None:
        found = self._node.attributes.get(name, value)
        if found not in (value, -1 if value else 0):
            raise UnsupportedError(f"{self._where}: {name} = {show(repr(found))} is not supported")

    def _optional(self, place: int, types: tuple[str, ...]) -> Tensor | None:
        return self._tensor(place, types) if self._node.inputs[place : place + 1] not in ((), ("",)) else None

    def _tensor(self, place: int, types: tuple[str, ...]) -> Tensor:
        name = self._node.inputs[place] if place < len(self._node.inputs) else ""
        tensor = self._constants.found.get(name)
        if tensor is None:
            raise FormatError(f"{self._where}: its input {place} {show(name)} is no initializer")
        if tensor.type not in types:
            raise FormatError(f"{self._where}: {show(name)} is {tensor.type}, not {' or '.join(types)}")
        return tensor

    def _check_size(self, tensor: Tensor, nbytes: int) -> None:
        if tensor.nbytes != nbytes:
            raise FormatError(
                f"{self._where}: {show(tensor.name)} {list(tensor.shape)} has {tensor.nbytes} bytes, a matrix "
                f"{self.shape} in blocks of {self.block} has {nbytes}"
            )


def _store_8_bits(out: Bytes, codes: Bytes, scales: NDArray[np.float32]) -> None:
    """Blocks of Q8_0: 32 codes around 128, each group's scale in as many blocks as it takes."""
    blocks = out.reshape(len(out), -1, GGMLType.Q8_0.type_size)
    halves = np.repeat(scales, blocks.shape[1] // scales.shape[1], 1).astype("<f2")
    blocks[..., :2] = halves[..., None].view(np.uint8)
    blocks[..., 2:] = codes.reshape(*blocks.shape[:2], 32) ^ np.uint8(0x80)
