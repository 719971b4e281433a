"""Launches of the kernels that use matrix cores, and how the inner dimension is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import backend_of, register
from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType
from forge.ops.ordered import ORDERS, in_orders
from forge.ops.quant import Packed, Stack, parts_of
from forge.tuning.lds import (
    FEW_FORMATS,
    FEW_ROWS,
    WITHOUT_LINES,
    few_lds_bytes,
    group_lds_bytes,
    many_lds,
    quant_lds_bytes,
    tma_lds,
)
from forge.tuning.table import GROUP_ROWS, LINE_ROWS, MANY_ROWS, MATMUL_ROWS

MAX_ROWS = GROUP_ROWS[-1]
"""Up to so many rows of x the tile kernels multiply, although there is a BLAS: a captured step of such a batch is
replayed as a graph, which on CUDA cannot hold a call of BLAS."""
ROW_COUNTS = (1, *GROUP_ROWS, MAX_ROWS + 1)
"""Numbers of rows that are multiplied by different kernels: a vector's, tiles' of each size, and perhaps BLAS's."""
_LANE_PARTS = 4
"""Parts of the inner dimension that the lanes of a wave share, at most: TILE_PARTS of the tile files."""
LINE_WEIGHTS = 256
"""The inner dimension of products on Hopper with quantized matrices is a multiple of this."""
_REDUCE_BLOCK = 256
_MAX_SPLITS = {8: 8, 16: 8, 32: 16, 64: 16, 128: 8, 256: 4}
"""By tokens: partials of few are read soon, and more splits gain less than adding them takes."""
_BOX_ROWS = 64
"""Rows of a matrix that the bulk copy engine brings together."""
_MIN_STEPS = 2
"""Steps of the inner dimension in a split, at least: fewer do not pay for the reduction."""
_MIN_GLU_SPLITS = 4
"""Splits of a product with a gate, at least: fewer gain less than the launch of the reduction takes."""


@dataclass(frozen=True, slots=True)
class Partials:
    """Split-K partials: a float32 array (M, N) as a sum that the op which reads it computes.

    parts: float32 (S, M, N), the products of splits of the inner dimension.
    """

    parts: Any

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.parts.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts.dtype


register(Partials, lambda partials: backend_of(partials.parts))


def supports(weight: Any) -> bool:
    """Whether the kernels take a matrix: rows of whole vectors of 8 numbers."""
    if isinstance(weight, Stack):
        return all(map(supports, weight.parts))
    return isinstance(weight, Packed) or weight.shape[1] % 8 == 0


def matmul(
    device: GPU,
    x: Any,
    weight: Any,
    bias: Any,
    y: Any,
    column: int = 0,
    *,
    accumulate: bool = False,
    glu: str = "none",
    is_fixed: bool = False,
    sums_as_glu: bool = False,
) -> None:
    """y[:, column:column + N] = x @ weight.T + bias, or += with accumulate.

    x: act (M, K) or `Ordered`. weight: (N, K). bias: float32 (N,) or None. y: float32 (M, at least column + N). With
    glu, silu or gelu: act (M, N / 2), the activation of the product's first half times the second, or the same in both
    ORDERS of `Ordered`, where it `leaves_orders`. is_fixed: A row's sums do not depend on M. sums_as_glu: They are
    added up in the order of a product with glu.
    """
    rows, outer, is_glu = x.shape[0], weight.shape[0], glu != "none"
    sums_as_glu = sums_as_glu or is_glu
    launch = _Launch(device, x, weight, bias, is_glu=sums_as_glu, is_fixed=is_fixed)
    x = getattr(in_orders(device, x, [launch.order]), launch.order)
    product, gated = (None, y) if is_glu else (y, None)
    if is_glu and y.ndim > 2:
        launch.defines["ORDERED"] = 1
    epilogue: dict[str, Any] = {"accumulate": int(accumulate), "gelu": int(glu == "gelu")}
    if launch.splits < (_MIN_GLU_SPLITS if sums_as_glu else 2):
        launch.run(x, product, gated, outer if is_glu else y.shape[1], column, **epilogue)
        return
    partials = device.empty((launch.splits, rows, outer), np.float32)
    launch.run(x, partials, None, outer, splits=launch.splits)
    outputs = outer // 2 if is_glu else outer
    sizes = (rows, outer, 0 if is_glu else y.shape[1], column, *epilogue.values(), launch.splits)
    blocks = -(-rows * outputs // _REDUCE_BLOCK)
    device.run("split_k_reduce", "split_k_reduce", blocks, partials, product, gated, *sizes)


def split_k(device: GPU, x: Any, weight: Any, bias: Any, *, is_fixed: bool = False) -> Partials:
    """x @ weight.T + bias, not yet added up; weight may be a Stack, except with is_fixed."""
    columns = parts_of(weight, bias)
    launches = [_Launch(device, x, part, part_bias, is_glu=False, is_fixed=is_fixed) for _, part, part_bias in columns]
    # Those of the largest part: more of its blocks than there is room for would wait for the first.
    rows, outer, splits = x.shape[0], weight.shape[0], max(launches, key=lambda launch: launch.weight.shape[0]).splits
    partials = device.empty((splits, rows, outer), np.float32)
    x = in_orders(device, x, [launch.order for launch in launches])
    for launch, (column, *_) in zip(launches, columns, strict=True):
        launch.run(getattr(x, launch.order), partials, None, outer, column, splits=splits)
    return Partials(partials)


def orders_of(device: GPU, rows: int, weight: Any, *, is_glu: bool, is_fixed: bool) -> list[str]:
    """The orders of `Ordered` in which products take so many rows of x; none where one takes them as they are."""
    parts = [part for _, part, _ in parts_of(weight, None)]
    taken = {_order_of(_kernel_of(device, part, rows, is_glu=is_glu, is_fixed=is_fixed), part) for part in parts}
    return [] if "natural" in taken else [order for order in ORDERS if order in taken]


def takes_orders(weight: Any) -> bool:
    """Whether products of some rows with this matrix read x in ORDERS, which the product before them may leave."""
    has_lines = isinstance(weight, Packed) and weight.type.name not in WITHOUT_LINES
    return has_lines and weight.shape[1] % LINE_WEIGHTS == 0


def leaves_orders(device: GPU, x: Any, weight: Any, *, is_fixed: bool) -> bool:
    """Whether a product with a gate can write all ORDERS of its result, of which (N / 2) is then a multiple of 256.

    Of more rows the product behind it may go to BLAS, which takes rows as they are.
    """
    if x.shape[0] > MAX_ROWS:
        return False
    launch = _Launch(device, x, weight, None, is_glu=True, is_fixed=is_fixed)
    is_whole = launch.splits < _MIN_GLU_SPLITS and weight.shape[0] // 2 % LINE_WEIGHTS == 0
    return launch.order != "natural" and is_whole


def _order_of(kernel: str, weight: Any) -> str:
    """How a kernel takes x: a field of `Ordered`."""
    if kernel != "matmul_wgmma_quant_many":
        return "natural"
    return "halves" if weight.type is GGMLType.Q6_K else "parts"


_ROWS = {
    "matmul": MATMUL_ROWS,
    "matmul_mma_quant": FEW_ROWS,
    "matmul_tma": GROUP_ROWS,
    "matmul_wgmma": MATMUL_ROWS,
    "matmul_wgmma_quant": LINE_ROWS,
    "matmul_wgmma_quant_many": MANY_ROWS,
}
"""Rows of x that each kernel's blocks may have, in variants up to each of these."""
_OF_LINES = ("matmul_mma_quant", "matmul_wgmma_quant", "matmul_wgmma_quant_many")
"""Kernels of quantized matrices on Hopper."""


def _shape_of(weight: Any, *, is_glu: bool) -> dict[str, Any]:
    """A product as the tuning table has it, but for its rows of x."""
    outer, inner = weight.shape
    return {
        "op": "rms_gated" if is_glu else "linear",
        "format": weight.type.name if isinstance(weight, Packed) else "F16",
        "inner": inner,
        "outer": outer // 2 if is_glu else outer,
    }


def _most_rows(counts: Sequence[int], rows: int) -> int:
    """The first of the numbers that is not less than `rows`, or the last."""
    return next((most for most in counts if rows <= most), counts[-1])


def _kernel_of(device: GPU, weight: Any, rows: int, *, is_glu: bool, is_fixed: bool) -> str:
    if not device.has_wgmma:
        return "matmul"
    if not isinstance(weight, Packed):
        return "matmul_wgmma" if rows <= MATMUL_ROWS[-1] or is_fixed else "matmul_tma"
    if is_fixed or not takes_orders(weight):
        return "matmul"
    if rows <= FEW_ROWS[-1] and weight.type.name in FEW_FORMATS:
        shape = _shape_of(weight, is_glu=is_glu)
        choice = device.choice("quant_product", **shape, tokens=_most_rows(FEW_ROWS, rows))
        return "matmul_wgmma_quant" if choice["GROUPS"] else "matmul_mma_quant"
    return "matmul_wgmma_quant" if rows <= LINE_ROWS[-1] else "matmul_wgmma_quant_many"


class _Launch:
    """A launch of the kernel: its grid, and how the inner dimension is split."""

    def __init__(self, device: GPU, x: Any, weight: Any, bias: Any, *, is_glu: bool, is_fixed: bool = False) -> None:
        self.device, self.shape, self.weight, self.bias = device, x.shape, weight, bias
        (rows, inner), outer = x.shape, weight.shape[0]
        self.kernel = _kernel_of(device, weight, rows, is_glu=is_glu, is_fixed=is_fixed)
        self.order = _order_of(self.kernel, weight)
        shape = _shape_of(weight, is_glu=is_glu)
        format = shape["format"]

        def choice_for(tokens: int) -> Mapping[str, int]:
            return device.choice(self.kernel, **shape, tokens=tokens)

        counts = _ROWS[self.kernel]
        tokens = _most_rows(counts, rows)
        choice = splitting = choice_for(tokens)
        turn = LINE_WEIGHTS // _LANE_PARTS
        if self.kernel not in _OF_LINES:
            turn = weight.weights_per_thread if isinstance(weight, Packed) else 32
        if is_fixed:
            # What a split begins with is the same for any number of rows: it is whole stages, which are those of the
            # most rows, or at most a turn of the main loop.
            splitting = choice_for(counts[-1])
            stage_steps = min(choice.get("STAGE_STEPS", 1), turn // 16)
            choice = splitting if self.kernel == "matmul_wgmma" else {**choice, "STAGE_STEPS": stage_steps}
        values = {name: value for name, value in choice.items() if name != "SPLITS"}
        self.defines: dict[str, int | str] = {"TOKENS": tokens, **values, **self._defines(format, tokens, choice)}
        together = int(self.defines["TOKENS"])
        # Blocks of more rows of x lie beside each other, so that they find weights in a cache.
        blocks, row_blocks = -(-outer // self._rows_of_block(choice)), -(-rows // together)
        self.grid = (blocks, 1, 1)
        if row_blocks > 1:
            self.defines["MORE_TOKENS"] = 1
            self.grid = (row_blocks, 1, blocks)
        # Where the rows of the matrix are blocks too few to fill the device, more of them share the inner dimension.
        steps = -(-inner // (_LANE_PARTS * turn))
        room = device.num_cus * splitting.get("MIN_BLOCKS", 1) // -(-outer // self._rows_of_block(splitting))
        if not is_fixed:
            room //= row_blocks
        most = choice.get("SPLITS", _MAX_SPLITS[counts[-1] if is_fixed else tokens])
        self.splits = max(min(room, steps // _MIN_STEPS, most), 1)
        if self.kernel == "matmul_mma_quant":  # no split is empty
            self.splits = -(-steps // -(-steps // self.splits))

    def _defines(self, format: str, tokens: int, choice: Mapping[str, int]) -> dict[str, int | str]:
        """What the kernel is compiled with beside the choice."""
        if self.kernel == "matmul_wgmma":
            return {"LDS_BYTES": group_lds_bytes(tokens, choice)}
        if self.kernel == "matmul_tma":
            return {"THREADS": choice["BLOCK"] + 128, "MIN_BLOCKS": 1, **tma_lds(choice)}
        number = int(GGMLType[format])
        if self.kernel == "matmul_mma_quant":
            return {"FORMAT": number, "LDS_BYTES": few_lds_bytes(format, choice)}
        if self.kernel == "matmul_wgmma_quant":
            return {"FORMAT": number, "LDS_BYTES": quant_lds_bytes(format, tokens, choice)}
        if self.kernel == "matmul_wgmma_quant_many":
            return {"FORMAT": number, "THREADS": choice["BLOCK"] + 128, **many_lds(format, choice)}
        return {"FORMAT": number, "WEIGHT": "f16" if format == "F16" else "u8"}

    def run(
        self,
        x: Any,
        y: Any,
        gated: Any,
        stride: int,
        column: int = 0,
        *,
        accumulate: int = 0,
        gelu: int = 0,
        splits: int = 1,
    ) -> None:
        """x: In the order `order`."""
        weight = self.weight
        planes: tuple[Any, ...]
        if isinstance(weight, Packed):
            planes = weight.planes
        elif self.kernel == "matmul_tma":
            planes = (self._map_of(weight, _BOX_ROWS),)
        else:
            planes = (weight,) if self.kernel == "matmul_wgmma" else (weight, None, None, None)
        sizes = (*self.shape, weight.shape[0], stride, column, accumulate, gelu, splits)
        if self.kernel == "matmul_tma":
            x = self._map_of(x, int(self.defines["TOKENS"]))
        arrays = x, *planes, self.bias, y, gated
        grid = (self.grid[0], splits, self.grid[2])
        self.device.run(self.kernel, self.kernel, grid, *arrays, *sizes, **self.defines)

    def _map_of(self, matrix: Any, rows: int) -> Any:
        """The tensor map of a matrix, for boxes of so many rows."""
        outer, inner = matrix.shape
        return self.device.tensor_map(matrix.reshape(1, outer, 1, inner), rows)

    def _rows_of_block(self, choice: Mapping[str, int]) -> int:
        """Rows of the matrix that a block of the kernel takes."""
        if self.kernel == "matmul_tma":
            return _BOX_ROWS * choice["TILES"] * choice["BLOCK"] // 128
        return 16 * choice["TILES"] * (choice["BLOCK"] // self.device.wave_size)
