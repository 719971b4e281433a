"""The product of 2 to 64 rows of x with a matrix, on the matrix cores: how it is cut, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import backend_of, register
from forge.backend.gpu import GPU
from forge.ops.quant import Packed, Stack
from forge.tuning.table import MATMUL_ROWS, group_lds_bytes

MAX_ROWS = MATMUL_ROWS[-1]
"""Rows of x that a launch takes: the weights are read once for all of them."""
ROW_COUNTS = (1, *MATMUL_ROWS, MAX_ROWS + 1)
"""Numbers of rows that are multiplied by different kernels: a vector's, tiles' of each size, and BLAS's."""
_PARTS = 4
"""Parts of the inner dimension that the lanes of a wave share, at most: TILE_PARTS of the tile files."""
_JOIN_BLOCK = 256
_MAX_SLICES = {8: 8, 16: 8, 32: 16, 64: 16}
"""By tokens: few are read soon, and more slices gain less than adding them takes."""
_MIN_TURNS = 2
"""Turns of a slice, at least: fewer do not pay for what adds it."""
_GATED_SLICES = 4
"""A product with a gate is cut into so many at least: for fewer, what the launch that joins them takes is more."""


@dataclass(frozen=True, slots=True)
class Slices:
    """A float32 array (M, N) as the sum of others, for an op that adds them as it reads them.

    parts: float32 (S, M, N), the products of slices of the inner dimension.
    """

    parts: Any

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.parts.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts.dtype


register(Slices, lambda slices: backend_of(slices.parts))


def is_tiled(weight: Any) -> bool:
    """Whether the kernel reads such a matrix: rows of whole pieces of 8 numbers."""
    if isinstance(weight, Stack):
        return all(map(is_tiled, weight.parts))
    return isinstance(weight, Packed) or weight.shape[1] % 8 == 0


def kernel_of(device: GPU, *, is_packed: bool) -> str:
    """Which kernel computes products with quantized or float16 matrices."""
    return "matmul_wgmma" if device.has_wgmma and not is_packed else "matmul"


def tile_product(
    device: GPU,
    x: Any,
    weight: Any,
    bias: Any,
    y: Any = None,
    column: int = 0,
    *,
    accumulate: bool = False,
    gated: Any = None,
    activation: str = "silu",
) -> None:
    """y[:, column:column + N] = x @ weight.T + bias, or += with accumulate; x: act (M, K), weight: (N, K), M <= 64.

    With gated, act (M, N / 2): that becomes the activation of the product's first half, times its second half.
    """
    rows, outer = len(x), weight.shape[0]
    launch = _Launch(device, x, weight, "linear" if gated is None else "rms_gated")
    gelu = int(activation == "gelu")
    if launch.slices < (2 if gated is None else _GATED_SLICES):
        stride = outer if y is None else y.shape[1]
        launch.run(bias, y, gated, stride, column, accumulate=int(accumulate), gelu=gelu)
        return
    parts = device.empty((launch.slices, rows, outer), np.float32)
    launch.run(bias, parts, None, outer, slices=launch.slices)
    outputs = outer if gated is None else outer // 2
    sizes = (rows, outer, 0 if y is None else y.shape[1], column, int(accumulate), gelu, launch.slices)
    device.run("split_k_reduce", "split_k_reduce", -(-rows * outputs // _JOIN_BLOCK), parts, y, gated, *sizes)


def tile_slices(device: GPU, x: Any, weight: Any, bias: Any) -> Slices:
    """x @ weight.T + bias, not yet added up; weight may be a Stack."""
    launches = [
        _Launch(device, x, part, "linear") for part in (weight.parts if isinstance(weight, Stack) else (weight,))
    ]
    rows, outer, slices = len(x), weight.shape[0], max(launch.slices for launch in launches)
    parts, column = device.empty((slices, rows, outer), np.float32), 0
    for launch in launches:
        width = launch.weight.shape[0]
        own_bias = None if bias is None else bias[column : column + width]
        launch.run(own_bias, parts, None, outer, column, slices=slices)
        column += width
    return Slices(parts)


class _Launch:
    """How a product is cut."""

    def __init__(self, device: GPU, x: Any, weight: Any, op: str) -> None:
        self.device, self.x, self.weight = device, x, weight
        (rows, inner), outer = x.shape, weight.shape[0]
        is_packed = isinstance(weight, Packed)
        tokens = next(most for most in MATMUL_ROWS if rows <= most)
        self.file = kernel_of(device, is_packed=is_packed)
        self.is_group = self.file == "matmul_wgmma"
        choice = device.choice(
            self.file,
            op=op,
            format=weight.type.name if is_packed else "F16",
            inner=inner,
            outer=outer if op == "linear" else outer // 2,
            tokens=tokens,
        )
        rows_of_block = 16 * choice["TILES"] * (choice["BLOCK"] // device.wave_size)
        self.defines: dict[str, int | str] = {"TOKENS": tokens, **choice}
        if self.is_group:
            self.defines["LDS_BYTES"] = group_lds_bytes(tokens, choice)
        else:
            self.defines |= (
                {"FORMAT": int(weight.type), "WEIGHT": "u8"} if is_packed else {"FORMAT": 1, "WEIGHT": "f16"}
            )
        self.blocks = -(-outer // rows_of_block)
        # Where the rows of the matrix are blocks too few to fill the device, more of them share the inner dimension.
        turns = -(-inner // (_PARTS * (weight.unit if is_packed else 32)))
        room = device.num_cus * choice["MIN_BLOCKS"] // self.blocks
        self.slices = max(min(room, turns // _MIN_TURNS, _MAX_SLICES[tokens]), 1)

    def run(
        self,
        bias: Any,
        y: Any,
        gated: Any,
        stride: int,
        column: int = 0,
        *,
        accumulate: int = 0,
        gelu: int = 0,
        slices: int = 1,
    ) -> None:
        weight = self.weight
        planes = weight.planes if isinstance(weight, Packed) else (weight,) if self.is_group else (weight, *3 * (None,))
        sizes = (*self.x.shape, weight.shape[0], stride, column, accumulate, gelu, slices)
        arrays = self.x, *planes, bias, y, gated
        self.device.run(self.file, self.file, (self.blocks, slices), *arrays, *sizes, **self.defines)
