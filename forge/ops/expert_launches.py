"""Launches of the kernels of mixtures of experts.

All of them read on the device which experts were chosen, so that no step waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType
from forge.ops import expert_wgmma
from forge.ops.expert_groups import Grouped, empty_groups, rows_of, tile_rows
from forge.ops.matmul import LINE_WEIGHTS, Partials
from forge.ops.norm import Normed
from forge.ops.quant import Packed, planes_of
from forge.tuning.lds import FEW_FORMATS, FEW_ROWS, few_lds_bytes, row_groups

_ACTIVATIONS = {"silu": 0, "gelu": 1, "clamped_swiglu": 2, "relu2": 3}
_VECTOR_ROWS, _FEW_VECTOR_ROWS = 8, 4
"""Rows that matrix-vector products compute at most, and where tiles of few rows have a kernel of their own."""
_F16_BLOCK = 256
_MAX_WIDTH = 16_384
"""Numbers of a row that the threads of a block hold, of float16 matrices."""
_ACT_THREADS = 256


@dataclass(frozen=True, slots=True)
class How:
    """activation: of the experts. weighs_input: A row's weights multiply its first products, not its results.
    is_fixed: A row's result does not depend on the rows beside it."""

    activation: str
    weighs_input: bool
    is_fixed: bool

    @property
    def is_gated(self) -> bool:
        return self.activation != "relu2"


def takes_rows(device: GPU, operand: Any, chosen: Any, experts: Any) -> bool:
    """Whether matrix-vector kernels compute the experts: of one row, or of few, which seldom have an expert in common,
    where their tiles have no kernel of their own. What two rows read then comes from a cache."""
    rows, used = chosen.shape
    most = _FEW_VECTOR_ROWS if takes_few(device, experts) else _VECTOR_ROWS
    if rows > 1 and (rows > most or rows * used > experts.count):
        return False
    if experts.up is not None or (isinstance(operand, Normed) and operand.shape[1] > 8192):
        return False
    return all(matrix.shape[1] <= _max_width(matrix) for matrix in (experts.gate, experts.down))


def _max_width(weight: Any) -> int:
    """Numbers of a row at most: of x, or of the activations of all experts together."""
    return 32 * row_groups(weight.type.name)[-1] if isinstance(weight, Packed) else _MAX_WIDTH


def by_rows(device: GPU, operand: Any, chosen: Any, weights: Any, experts: Any, residual: Any, how: How) -> Any:
    """Few rows, by matrix-vector products: the first of all their experts in one launch, the second with their sum in
    another, or some where the experts are wide.

    operand: act (M, K), or Normed with an RMS norm and nothing pending. residual: float32 (M, K) that the result is
    added to and that is returned, or None.
    """
    (rows, used), (outer, width) = chosen.shape, (operand.shape[1], experts.down.shape[1])
    y = device.empty((rows, outer), np.float32) if residual is None else residual
    h = device.empty((rows * used, width), device.dtype)
    factors = weights if how.weighs_input else None
    x, norm, eps = (operand.x, operand.weight, operand.eps) if isinstance(operand, Normed) else (operand, None, 0.0)
    inner = x.shape[1]
    defines = {"IN": "float" if isinstance(operand, Normed) else "f16", "GATED": int(how.is_gated), "SILU": 1}
    outputs = width * (2 if how.is_gated else 1)
    kernel, blocks, choice = _row_launch(device, "expert_up", experts.gate, inner, outputs, rows * used)
    head, sizes = (x, norm, eps, chosen, factors), (inner, width, used, _ACTIVATIONS[how.activation], blocks)
    arrays = *head, *planes_of(experts.gate), experts.gate_bias, h
    device.run(kernel, kernel, (blocks, rows, used), *arrays, *sizes, **choice, **defines)
    together = min(used, _max_width(experts.down) // width)
    for first in range(0, used, together):
        count = min(together, used - first)
        kernel, blocks, choice = _row_launch(device, "expert_down", experts.down, count * width, outer, rows)
        factors = None if how.weighs_input else weights.reshape(-1)[first:]
        arrays = h[first:], chosen.reshape(-1)[first:], factors, *planes_of(experts.down), experts.down_bias, y
        numbers = width, count, used, outer, int(residual is not None or first > 0), blocks
        device.run(kernel, kernel, (blocks, rows), *arrays, *numbers, **choice, GATED=0, SILU=1)
    return y


def _row_launch(
    device: GPU, kernel: str, weight: Any, inner: int, outer: int, parts: int
) -> tuple[str, int, dict[str, int | str]]:
    """A kernel's name, blocks of each of the grid's parts, and what it is compiled with. outer: Rows of a part."""
    choice: dict[str, int | str]
    if isinstance(weight, Packed):
        values = device.choice(kernel, format=weight.type.name, inner=inner)
        choice = {**values, "FORMAT": int(weight.type), "MAX_GROUPS": inner // 32}
        teams, rows, min_blocks = values["BLOCK"] // values["THREADS_PER_ROW"], values["ROWS"], values["MIN_BLOCKS"]
        kernel = f"{kernel}_quant"
    else:
        teams, rows, min_blocks, kernel = 1, 2, 2048 // _F16_BLOCK, f"{kernel}_f16"
        pieces = 1 << (-(-inner // (8 * _F16_BLOCK)) - 1).bit_length()
        choice = {"BLOCK": _F16_BLOCK, "ROWS": rows, "PIECES": pieces}
    groups = -(-outer // (rows * teams))
    blocks = -(-groups // -(-groups // max(device.num_cus * min_blocks // parts, 1)))
    return kernel, blocks, choice


def tiles(
    device: GPU, x: Any, chosen: Any, weights: Any, experts: Any, residual: Any, how: How, *, leaves_partials: bool
) -> Any:
    """Any number of rows, by tiles on the matrix cores: pairs of a row and an expert are grouped by expert.

    x: act (M, K). residual: float32 (M, K) that the result is added to and that is returned, or None. leaves_partials:
    Without a residual the result may be `Partials`. A row's result does not depend on the rows beside it.
    """
    (rows, used), outer = chosen.shape, x.shape[1]
    grouped = _Groups(device, chosen, experts, is_fixed=how.is_fixed)
    factors, shares = (weights, None) if how.weighs_input else (None, weights)
    activation = _ACTIVATIONS[how.activation]
    if grouped.is_many:
        lists = grouped.pairs, grouped.tiles
        parts = expert_wgmma.multiply(device, x, *lists, experts, factors, shares, grouped.tokens, activation)
    else:
        parts = _multiply(device, x, grouped, experts, factors, shares, how)
    if residual is None and leaves_partials:
        return Partials(parts)
    y = device.empty((rows, outer), np.float32) if residual is None else residual
    sizes = (rows, outer, outer, 0, int(residual is not None), 0, used)
    device.run("split_k_reduce", "split_k_reduce", -(-rows * outer // 256), parts, y, None, *sizes)
    return y


def _multiply(device: GPU, x: Any, grouped: _Groups, experts: Any, factors: Any, shares: Any, how: How) -> Any:
    """The results of all pairs, float32 (U, M, K)."""
    pairs, width = grouped.rows * grouped.used, experts.down.shape[1]
    h = device.empty((pairs, width), device.dtype)
    activation = _ACTIVATIONS[how.activation]
    if experts.up is None:
        grouped.run(x, experts.gate, experts.gate_bias, None, h, factors, activation, is_gated=how.is_gated)
    else:
        both = device.empty((1, pairs, 2 * width), np.float32)
        grouped.run(x, experts.gate, experts.gate_bias, both, None, factors)
        grouped.run(x, experts.up, experts.up_bias, both, None, factors, column=width)
        device.run("expert_act", "expert_act", (pairs, -(-width // _ACT_THREADS)), both, h, width, activation)
    parts = device.empty((grouped.used, grouped.rows, x.shape[1]), np.float32)
    grouped.run(h, experts.down, experts.down_bias, parts, None, shares=shares)
    return parts


def takes_few(device: GPU, experts: Any, *, is_fixed: bool = False) -> bool:
    """Whether tiles of few rows have a kernel of their own: codes are float16 numbers by an instruction or two, in
    lines of 256 weights. Of MXFP4 the last may be less."""

    def has_lines(matrix: Any) -> bool:
        if not isinstance(matrix, Packed) or matrix.type.name not in FEW_FORMATS:
            return False
        return matrix.shape[1] % (64 if matrix.type is GGMLType.MXFP4 else LINE_WEIGHTS) == 0

    is_able = device.has_wgmma and not is_fixed and experts.up is None
    return is_able and has_lines(experts.gate) and has_lines(experts.down)


class _Groups:
    """Pairs of a row and one of its experts, by expert, and tiles of them. How many tiles have pairs is known to the
    device alone; the host knows how many there can be."""

    def __init__(self, device: GPU, chosen: Any, experts: Any, *, is_fixed: bool) -> None:
        self.rows, self.used = chosen.shape
        total, count = self.rows * self.used, experts.count
        self.device, self.count = device, count
        self.tokens = tile_rows(device, self.rows, self.used, count)
        self.is_few = self.tokens == FEW_ROWS[0] and takes_few(device, experts, is_fixed=is_fixed)
        self.is_many = self.tokens > FEW_ROWS[-1] and not is_fixed and expert_wgmma.takes(device, experts)
        if self.is_many:
            self.tokens = expert_wgmma.tile_rows(total, count)
        elif not self.is_few:
            self.tokens = tile_rows(device, self.rows, self.used, count, is_plain=True)
        if isinstance(chosen, Grouped) and chosen.rows == self.tokens:
            grouped = chosen
        else:
            grouped = empty_groups(device, rows_of(chosen), count, self.tokens)
            sizes = (total, count, self.tokens, len(grouped.tiles))
            lists = grouped.chosen, grouped.pairs, grouped.tiles
            device.run("expert_groups", "group_experts", count, *lists, *sizes)
        self.pairs, self.tiles, self.num_tiles = grouped.pairs, grouped.tiles, len(grouped.tiles)

    def run(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        y: Any,
        h: Any,
        factors: Any = None,
        activation: int = 0,
        *,
        shares: Any = None,
        column: int = 0,
        is_gated: bool = False,
    ) -> None:
        """Multiply all tiles. y or h is written, see expert_matmul.hip. factors, shares: float32 (M, U), of products
        and of results in y."""
        inner, outer = weight.shape[1], weight.shape[0] // self.count
        is_packed = isinstance(weight, Packed)
        format = weight.type.name if is_packed else "F16"
        shape = {"op": "rms_gated" if is_gated else "linear", "format": format, "inner": inner}
        kernel, rows = ("expert_mma_quant", {"rows": self.rows}) if self.is_few else ("matmul", {})
        shape |= {"outer": outer // (2 if is_gated else 1), "tokens": self.tokens, **rows}
        choice = self.device.choice(kernel, **shape)
        planes = weight.planes if is_packed else (weight, None, None, None)
        of_x = len(self.pairs) // len(x)
        lists, matrices = (x, self.tiles, self.pairs), (*planes, bias, y, h)
        tile_rows = 16 * choice["TILES"] * (choice["BLOCK"] // self.device.wave_size)
        defines = {"TOKENS": self.tokens, "FORMAT": int(GGMLType[format]), "GATED": int(is_gated)}
        if self.is_few:
            grid = self.num_tiles, -(-outer // (tile_rows * choice["ROUNDS"]))
            arrays = *lists, factors if y is None else shares, *matrices, of_x
            sizes = (self.rows, self.used, inner, outer, activation)
            more = {"FIRST": int(y is None), "LDS_BYTES": few_lds_bytes(format, choice)}
            more |= {"HAS_TAIL": 1} if inner % LINE_WEIGHTS else {}
            self.device.run("expert_mma_quant", "expert_mma_quant", grid, *arrays, *sizes, **defines, **choice, **more)
            return
        values = {name: value for name, value in choice.items() if name != "SPLITS"}
        # Of y each place has its rows, (U, M, stride), but products of a matrix that is one of two, (P, stride).
        places, stride = (1, outer) if y is None else (y.shape[0], y.shape[2])
        self.device.run(
            "expert_matmul",
            "expert_matmul",
            (self.num_tiles, 1, -(-outer // tile_rows)),
            *(*lists, factors, shares, *matrices, of_x),
            *(places, len(self.pairs) // places, inner, outer, stride, column, activation),
            **defines,
            **values,
            WEIGHT="u8" if is_packed else "f16",
            MORE_TOKENS=1,
        )
