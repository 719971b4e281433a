"""Quantized matrices: in the ggml blocks of their file, or repacked into planes for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.formats import ggml

FORMATS = tuple(type.name for type in ggml.BLOCK_FORMATS)
"""Names of the block types that have kernels."""


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """(rows, cols) weights as ggml blocks.

    blocks: uint8 (rows, bytes per row). Layouts: ggml's `ggml-common.h`; `formats.ggml` dequantizes them.
    """

    type: ggml.GGMLType
    shape: tuple[int, int]
    blocks: npt.NDArray[np.uint8]

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 (rows, cols)."""
        return ggml.dequantize(self.blocks, self.type)

    def rows(self, index: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """float32 (len(index), cols), these rows alone."""
        return ggml.dequantize(self.blocks[index], self.type)

    def on(self, backend: Backend) -> QuantTensor | Packed:
        """The same matrix in the form that a backend's ops read: on a GPU its blocks are repacked."""
        if not backend.is_gpu:
            return self
        return Packed(self.type, self.shape, *split(self.type, self.blocks)).on(backend)

    @classmethod
    def random(cls, type_name: str, rows: int, cols: int, rng: np.random.Generator, scale: float = 0.01) -> QuantTensor:
        """Random quants with scales from scale / 10 to scale, for cases and benchmarks."""
        kind = ggml.GGMLType[type_name]
        size = kind.type_size
        blocks = rng.integers(0, 256, (rows, cols // kind.block_size, size), np.uint8)

        def draw() -> npt.NDArray[np.float16]:
            return rng.uniform(scale / 10, scale, blocks.shape[:2]).astype(np.float16)

        for offset in ggml.BLOCK_FORMATS[kind].halves:
            blocks[..., offset : offset + 2] = draw()[..., None].view(np.uint8)
        if not kind.in_files:
            blocks[..., 2:4] = rng.integers(0, 17, blocks.shape[:2], np.uint16)[..., None].view(np.uint8)
        if kind is ggml.GGMLType.MXFP4:
            blocks[..., 0] = np.frexp(draw().astype(np.float32))[1] + 127
        if kind is ggml.GGMLType.IQ1_M:
            parts = draw()[..., None].view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15  # low ones first
            blocks[..., 49::2] = blocks[..., 49::2] & 15 | parts << 4
        return cls(kind, (rows, cols), blocks.reshape(rows, -1))


@dataclass(frozen=True, slots=True)
class Packed:
    """(rows, cols) weights on a GPU: the fields of the blocks in planes of their own, so that threads read whole lines.

    Planes take as many bytes as the file's blocks. Each is uint8 (rows, blocks per row * bytes of the field), or None
    where the type has no such field. quants: the low bits of the weights. high: their high bits. scales: the scales of
    groups. deltas: the scales, and minima, of blocks.
    """

    type: ggml.GGMLType
    shape: tuple[int, int]
    quants: Any
    high: Any
    scales: Any
    deltas: Any

    @classmethod
    def empty(cls, type: ggml.GGMLType, shape: tuple[int, int], backend: Backend | None = None) -> Packed:
        """A matrix whose contents are undefined; without a backend its planes lie on the host."""
        empty = backend.empty if backend else np.empty
        rows, blocks = shape[0], shape[1] // type.block_size
        fields = ggml.BLOCK_FORMATS[type].planes
        widths = (None if field is None else blocks * (field[1] - field[0]) for field in fields)
        return cls(type, shape, *(None if width is None else empty((rows, width), np.uint8) for width in widths))

    def on(self, backend: Backend) -> Packed:
        """A copy on a backend, of planes that may lie on the host."""
        planes = (None if plane is None else backend.asarray(plane) for plane in self.planes)
        return Packed(self.type, self.shape, *planes)

    @property
    def planes(self) -> tuple[Any, Any, Any, Any]:
        return self.quants, self.high, self.scales, self.deltas

    @property
    def weights_per_thread(self) -> int:
        """Weights that a thread reads together."""
        return ggml.BLOCK_FORMATS[self.type].weights_per_thread

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes if plane is not None)


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of different types with the same cols, one on top of the other. One product computes them all."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 (rows, cols), for references: the parts are on the host."""
        return np.concatenate([p.dequantize() if isinstance(p, QuantTensor) else p for p in self.parts])

    def on(self, backend: Backend) -> Stack:
        """The same matrices in the form that a backend's ops read."""
        return Stack(tuple(p.on(backend) if isinstance(p, QuantTensor) else backend.asarray(p) for p in self.parts))


def parts_of(weight: Any, bias: Any) -> list[tuple[int, Any, Any]]:
    """The first row of each matrix of a Stack, the matrix, and its bias. Another weight is its own only matrix."""
    parts, start = [], 0
    for part in weight.parts if isinstance(weight, Stack) else (weight,):
        end = start + part.shape[0]
        parts.append((start, part, None if bias is None else bias[start:end]))
        start = end
    return parts


def planes_of(weight: Any) -> tuple[Any, ...]:
    """The arrays of a matrix: the planes of Packed, or the matrix itself."""
    return weight.planes if isinstance(weight, Packed) else (weight,)


def split(
    type: ggml.GGMLType, blocks: npt.NDArray[np.uint8], out: Sequence[npt.NDArray[np.uint8] | None] | None = None
) -> tuple[npt.NDArray[np.uint8] | None, ...]:
    """The planes of blocks (rows, bytes per row): each uint8 (rows, blocks per row * bytes of its field).

    out: C-contiguous planes that are filled and returned instead of new ones.
    """
    whole = blocks.reshape(len(blocks), -1, type.type_size)  # (rows, blocks, bytes)
    if out is None:
        out = Packed.empty(type, (len(blocks), whole.shape[1] * type.block_size)).planes
    for field, plane in zip(ggml.BLOCK_FORMATS[type].planes, out, strict=True):
        if field is not None and plane is not None:
            part = whole[:, :, slice(*field)]
            plane.reshape(part.shape)[...] = part
    return tuple(out)
