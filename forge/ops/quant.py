"""Quantized matrices: in the ggml blocks of their file, or repacked into planes for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.formats import ggml

FORMATS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),  # blocks of 32
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),  # blocks of 256
)
"""Block types that have (or get) matrix-vector kernels."""


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
        """float32 (len(index), cols): only these rows are dequantized."""
        return ggml.dequantize(self.blocks[index], self.type)

    def on(self, backend: Backend) -> QuantTensor | Packed:
        """The same matrix as a backend's ops read it: repacked where there are kernels."""
        if not backend.is_gpu:
            return self
        planes = (None if plane is None else backend.asarray(plane) for plane in split(self.type, self.blocks))
        return Packed(self.type, self.shape, *planes)

    @classmethod
    def random(cls, type_name: str, rows: int, cols: int, rng: np.random.Generator, scale: float = 0.01) -> QuantTensor:
        """Random quants under scales from scale / 10 to scale, for cases and benchmarks."""
        kind = ggml.GGMLType[type_name]
        size = kind.type_size
        blocks = rng.integers(0, 256, (rows, cols // kind.block_size, size), np.uint8)
        for offset in _SCALE_OFFSETS[type_name]:
            drawn = rng.uniform(scale / 10, scale, blocks.shape[:2]).astype(np.float16)
            blocks[..., offset : offset + 2] = drawn[..., None].view(np.uint8)
        return cls(kind, (rows, cols), blocks.reshape(rows, -1))


@dataclass(frozen=True, slots=True)
class Packed:
    """(rows, cols) weights as planes on a GPU, at the size of the file: what is read together lies together.

    Each plane holds one field of all blocks, uint8 (rows, blocks per row * bytes of the field), or is None where the
    type has no such field: the quants, their high bits, the scales of groups, the scales (and minima) of blocks.
    """

    type: ggml.GGMLType
    shape: tuple[int, int]
    quants: Any
    high: Any
    scales: Any
    deltas: Any

    @property
    def planes(self) -> tuple[Any, Any, Any, Any]:
        return self.quants, self.high, self.scales, self.deltas

    @property
    def unit(self) -> int:
        """Weights that a thread reads at a time."""
        if self.type.block_size == 32:
            return 32
        return 128 if self.type.name in ("Q2_K", "Q3_K") else 64

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes if plane is not None)


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices on a GPU with the same cols and other types, one on top of the other: one product computes them all."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 (rows, cols) of parts that are on the host, as references need it."""
        return np.concatenate([p.dequantize() if isinstance(p, QuantTensor) else p for p in self.parts])

    def on(self, backend: Backend) -> Stack:
        """The same matrices as a backend's ops read them."""
        return Stack(tuple(p.on(backend) if isinstance(p, QuantTensor) else backend.asarray(p) for p in self.parts))


_FIELDS: dict[str, tuple[tuple[int, int] | None, ...]] = {  # quants, high bits, group scales, block scales
    "Q4_0": ((2, 18), None, None, (0, 2)),
    "Q4_1": ((4, 20), None, None, (0, 4)),
    "Q5_0": ((6, 22), (2, 6), None, (0, 2)),
    "Q5_1": ((8, 24), (4, 8), None, (0, 4)),
    "Q8_0": ((2, 34), None, None, (0, 2)),
    "IQ4_NL": ((2, 18), None, None, (0, 2)),
    "Q2_K": ((16, 80), None, (0, 16), (80, 84)),
    "Q3_K": ((32, 96), (0, 32), (96, 108), (108, 110)),
    "Q4_K": ((16, 144), None, (0, 16), None),  # block scales and group scales: 16 bytes that are read at once
    "Q5_K": ((48, 176), (16, 48), (0, 16), None),
    "Q6_K": ((0, 128), (128, 192), (192, 208), (208, 210)),
    "IQ4_XS": ((8, 136), None, (2, 8), (0, 2)),
}
"""Where each plane's bytes lie in a block: together all of its bytes, each once."""


def split(type: ggml.GGMLType, blocks: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8] | None, ...]:
    """The planes of blocks (rows, bytes per row): each uint8 (rows, blocks per row * bytes of its field)."""
    whole = blocks.reshape(len(blocks), -1, type.type_size)  # (rows, blocks, bytes)
    return tuple(
        None if field is None else np.ascontiguousarray(whole[:, :, slice(*field)]).reshape(len(blocks), -1)
        for field in _FIELDS[type.name]
    )


def join(type: ggml.GGMLType, planes: Sequence[npt.NDArray[np.uint8] | None]) -> npt.NDArray[np.uint8]:
    """The blocks of planes: what `split` took apart."""
    fields = zip(_FIELDS[type.name], planes, strict=True)
    present = [(field, plane) for field, plane in fields if field and plane is not None]
    (start, stop), first = present[0]
    rows, width = first.shape
    whole = np.empty((rows, width // (stop - start), type.type_size), np.uint8)
    for (start, stop), plane in present:
        whole[:, :, start:stop] = plane.reshape(rows, -1, stop - start)
    return whole.reshape(rows, -1)


_SCALE_OFFSETS = {  # bytes of the float16 scales (and minima) within a block
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
