"""Launches of the kernels of mixtures of experts.

All of them read on the device which experts were chosen, so that no step waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.formats.ggml import GGMLType
from forge.ops.norm import Normed
from forge.ops.quant import Packed
from forge.tuning.lds import row_groups
from forge.tuning.table import MATMUL_ROWS

_ACTIVATIONS = {"silu": 0, "gelu": 1, "clamped_swiglu": 2, "relu2": 3}
_ROUTE_THREADS = 128
_VECTOR_ROWS = 8
"""Rows that matrix-vector products compute at most."""
_F16_BLOCK = 256
_MAX_WIDTH = 16_384
"""Numbers of a row that the threads of a block hold, of float16 matrices."""
_SUM_THREADS = 256


@dataclass(frozen=True, slots=True)
class How:
    """activation: of the experts. weighs_input: A row's weights multiply its first products, not its results.
    accumulate: Results are added to y."""

    activation: str
    weighs_input: bool
    accumulate: bool

    @property
    def is_gated(self) -> bool:
        return self.activation != "relu2"


def route(device: GPU, normed: Normed, router: Any, *, is_sigmoid: bool, renormalizes: bool) -> tuple[Any, Any]:
    """The experts of each row, int32 (M, U), and their weights, float32 (M, U)."""
    if normed.pending is not None or not normed.is_rms:
        raise ValueError("route: rows have an RMS norm, and nothing pending")
    (rows, inner), experts, used = normed.shape, len(router.weight), router.used
    together, each = (1, 1) if rows <= 4 else (8, 1) if rows <= 128 else (8, 4)
    blocks = -(-experts // (_ROUTE_THREADS // device.wave_size * each))
    groups = -(-rows // together)
    logits = device.empty((rows, experts), np.float32)
    chosen, weights = device.empty((rows, used), np.int32), device.empty((rows, used), np.float32)
    vectors = normed.x, normed.weight, router.weight, router.bias, router.selection_bias, router.expert_scale
    numbers = normed.eps, router.scale, rows, inner, experts, used, router.groups, router.used_groups
    device.run(
        "route",
        "route",
        (blocks, groups),
        *(*vectors, logits, device.counters(groups), chosen, weights),
        *(*numbers, int(is_sigmoid), int(renormalizes), blocks),
        ROWS=together,
        EACH=each,
        VECTOR=4 if inner % 4 == 0 else 1,
    )
    return chosen, weights


def takes_rows(operand: Any, chosen: Any, experts: Any) -> bool:
    """Whether matrix-vector kernels compute the experts: of few rows, which seldom have an expert in common. What two
    rows read then comes from a cache."""
    rows, used = chosen.shape
    if rows > 1 and (rows > _VECTOR_ROWS or rows * used > experts.count):
        return False
    if experts.up is not None or (isinstance(operand, Normed) and operand.shape[1] > 8192):
        return False
    return all(matrix.shape[1] <= _max_width(matrix) for matrix in (experts.gate, experts.down))


def _max_width(weight: Any) -> int:
    """Numbers of a row at most: of x, or of the activations of all experts together."""
    return 32 * row_groups(weight.type.name)[-1] if isinstance(weight, Packed) else _MAX_WIDTH


def by_rows(device: GPU, operand: Any, chosen: Any, weights: Any, experts: Any, y: Any, how: How) -> None:
    """Few rows, by matrix-vector products: the first of all their experts in one launch, the second with their sum in
    another, or some where the experts are wide.

    operand: act (M, K), or Normed with an RMS norm and nothing pending. y: float32 (M, K).
    """
    (rows, used), (outer, width) = chosen.shape, (y.shape[1], experts.down.shape[1])
    h = device.empty((rows * used, width), device.dtype)
    factors = weights if how.weighs_input else None
    op = "linear" if not how.is_gated else "rms_gated"
    x, norm, eps = (operand.x, operand.weight, operand.eps) if isinstance(operand, Normed) else (operand, None, 0.0)
    inner = x.shape[1]
    defines = {"IN": "float" if isinstance(operand, Normed) else "f16", "GATED": int(how.is_gated), "SILU": 1}
    kernel, blocks, choice = _row_launch(device, "expert_up", experts.gate, op, inner, used * width, rows)
    head, sizes = (x, norm, eps, chosen, factors), (inner, width, used, _ACTIVATIONS[how.activation], blocks)
    arrays = *head, *_planes(experts.gate), experts.gate_bias, h
    device.run(kernel, kernel, (blocks, rows), *arrays, *sizes, **choice, **defines)
    together = min(used, _max_width(experts.down) // width)
    for first in range(0, used, together):
        count = min(together, used - first)
        kernel, blocks, choice = _row_launch(device, "expert_down", experts.down, "linear", count * width, outer, rows)
        factors = None if how.weighs_input else weights.reshape(-1)[first:]
        arrays = h[first:], chosen.reshape(-1)[first:], factors, *_planes(experts.down), experts.down_bias, y
        numbers = width, count, used, outer, int(how.accumulate or first > 0), blocks
        device.run(kernel, kernel, (blocks, rows), *arrays, *numbers, **choice, GATED=0, SILU=1)


def _row_launch(
    device: GPU, kernel: str, weight: Any, op: str, inner: int, outer: int, rows: int
) -> tuple[str, int, dict[str, int | str]]:
    """A kernel's name, blocks of a row, and what it is compiled with: as matrix-vector products of these sizes."""
    choice: dict[str, int | str]
    shape: dict[str, int | str] = {"op": op, "inner": inner, "outer": outer}
    if isinstance(weight, Packed):
        values = device.choice("matvec_quant", format=weight.type.name, **shape)
        most = next(most for most in row_groups(weight.type.name) if inner <= 32 * most)
        choice = {**values, "FORMAT": int(weight.type), "MAX_GROUPS": most}
        teams, rows, kernel = values["BLOCK"] // values["THREADS_PER_ROW"], values["ROWS"], f"{kernel}_quant"
        min_blocks = values["MIN_BLOCKS"]
    else:
        teams, rows, min_blocks, kernel = 1, 2, 2048 // _F16_BLOCK, f"{kernel}_f16"
        pieces = 1 << (-(-inner // (8 * _F16_BLOCK)) - 1).bit_length()
        choice = {"BLOCK": _F16_BLOCK, "ROWS": rows, "PIECES": pieces}
    groups = -(-outer // (rows // (2 if op == "rms_gated" else 1) * teams))
    blocks = -(-groups // -(-groups // max(device.num_cus * min_blocks // rows, 1)))
    return kernel, blocks, choice


def _planes(weight: Any) -> tuple[Any, ...]:
    return weight.planes if isinstance(weight, Packed) else (weight,)


def tiles(device: GPU, x: Any, chosen: Any, weights: Any, experts: Any, y: Any, how: How) -> None:
    """Any number of rows, by tiles on the matrix cores: pairs of a row and an expert are grouped by expert.

    x: act (M, K). y: float32 (M, K). A row's result does not depend on the rows beside it.
    """
    (rows, used), (outer, width) = chosen.shape, (y.shape[1], experts.down.shape[1])
    pairs = rows * used
    grouped = _Groups(device, chosen, experts.count)
    factors = weights if how.weighs_input else None
    h = device.empty((pairs, width), device.dtype)
    activation = _ACTIVATIONS[how.activation]
    if experts.up is None:
        grouped.run(x, experts.gate, experts.gate_bias, None, h, used, factors, activation, is_gated=how.is_gated)
    else:
        both = device.empty((pairs, 2 * width), np.float32)
        grouped.run(x, experts.gate, experts.gate_bias, both, None, used, factors)
        grouped.run(x, experts.up, experts.up_bias, both, None, used, factors, column=width)
        device.run("expert_sum", "expert_act", (pairs, -(-width // _SUM_THREADS)), both, h, width, activation)
    parts = device.empty((pairs, outer), np.float32)
    grouped.run(h, experts.down, experts.down_bias, parts, None, 1)
    shares = None if how.weighs_input else weights
    grid = (rows, -(-outer // _SUM_THREADS))
    device.run("expert_sum", "expert_sum", grid, parts, shares, y, outer, used, int(how.accumulate))


class _Groups:
    """Pairs of a row and one of its experts, by expert, and tiles of them. How many tiles have pairs is known to the
    device alone; the host knows how many there can be."""

    def __init__(self, device: GPU, chosen: Any, count: int) -> None:
        rows, used = chosen.shape
        total = rows * used
        self.device, self.count = device, count
        most = rows if rows <= MATMUL_ROWS[1] else max(min(rows, 4 * total // count), MATMUL_ROWS[1])
        self.tokens = next((tokens for tokens in MATMUL_ROWS if most <= tokens), MATMUL_ROWS[-1])
        self.num_tiles = min(count, total) + total // self.tokens
        self.pairs = device.empty((total,), np.int32)
        self.tiles = device.empty((self.num_tiles, 4), np.int32)
        sizes = (total, count, self.tokens, self.num_tiles)
        device.run("expert_groups", "group_experts", count, chosen, self.pairs, self.tiles, *sizes)

    def run(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        y: Any,
        h: Any,
        used: int,
        factors: Any = None,
        activation: int = 0,
        *,
        column: int = 0,
        is_gated: bool = False,
    ) -> None:
        """Multiply all tiles. used: Pairs of a row of x. y or h is written, see expert_matmul.hip."""
        inner, outer = weight.shape[1], weight.shape[0] // self.count
        is_packed = isinstance(weight, Packed)
        format = weight.type.name if is_packed else "F16"
        shape = {"op": "rms_gated" if is_gated else "linear", "format": format, "inner": inner}
        choice = self.device.choice("matmul", **shape, outer=outer // (2 if is_gated else 1), tokens=self.tokens)
        values = {name: value for name, value in choice.items() if name != "SPLITS"}
        blocks = -(-outer // (16 * choice["TILES"] * (choice["BLOCK"] // self.device.wave_size)))
        planes = weight.planes if is_packed else (weight, None, None, None)
        stride = outer if y is None else y.shape[1]
        self.device.run(
            "expert_matmul",
            "expert_matmul",
            (self.num_tiles, 1, blocks),
            *(x, self.tiles, self.pairs, factors, *planes, bias, y, h),
            *(used, inner, outer, stride, column, activation),
            TOKENS=self.tokens,
            **values,
            FORMAT=int(GGMLType[format]),
            WEIGHT="u8" if is_packed else "f16",
            MORE_TOKENS=1,
            GATED=int(is_gated),
        )
