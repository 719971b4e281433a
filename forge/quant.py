"""QuantTensor: a matrix kept in the ggml blocks of its file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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

    @classmethod
    def random(cls, type_name: str, rows: int, cols: int, rng: np.random.Generator) -> QuantTensor:
        """Random quants under finite scales of a usual size, for cases and benchmarks."""
        kind = ggml.GGMLType[type_name]
        size = kind.type_size
        blocks = rng.integers(0, 256, (rows, cols // kind.block_size, size), np.uint8)
        for offset in _SCALE_OFFSETS[type_name]:
            scale = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
            blocks[..., offset : offset + 2] = scale[..., None].view(np.uint8)
        return cls(kind, (rows, cols), blocks.reshape(rows, -1))


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
