"""How kernels multiply one row with a matrix: what a decode step of one sequence spends most of its time on.

The row may be the residual stream's, which each block then normalizes, and the result may go through a gated
activation: a launch less before the product, and one less behind it.
"""

from __future__ import annotations

from typing import Any

from forge.backend.gpu import GPU
from forge.quant import Packed

_OWN_GROUPS = (128, 256, 512)
"""With blocks, a row becomes digits in LDS, which keeps room for one of these numbers of groups of 32."""

_ROW_BLOCKS = (
    *((512, 64, 8, 10), (1024, 64, 4, 10), (2048, 256, 2, 4), (4096, 512, 2, 2)),
    *((8192, 512, 2, 2), (16_384, 512, 2, 1)),
)
"""float16: numbers of a row at most; threads of a block, which share the row, 8 numbers at a time; rows that they
compute at a time; blocks of a multiprocessor, for which there are registers and the grid is made. From 2,048 on
measured at the shapes of a 1B and an 8B model on an H100, of 64 to 1,024 threads, 1 to 8 rows, 512 to 2,048 threads of
a multiprocessor: 61 to 104% of a copy's rate."""
_WIDEST_NORM = 8192
"""Threads that hold more than 16 numbers of a row have no registers for the norm's."""
_BLOCK = 512
"""Blocks of weights: threads of a block."""
_TEAM = 32
_LARGE = ("Q3_K", "Q5_K", "Q6_K")
_SMALL_TEAMS = ("Q2_K", "Q3_K", "IQ4_XS")  # to take their codes apart costs more than to read
"""Threads that share a row, or half as many. As is _BLOCK, measured for Q4_K, Q5_K, Q6_K, Q8_0 and Q4_0 at the same
shapes, of teams of 16 to 128, 1 to 4 rows of a team, blocks of 128 to 1,024, and 1 and 2 units read ahead."""


def fits(weight: Any, *, normalized: bool = False) -> bool:
    """Whether a matrix has these kernels, `normalized` those that begin with a norm; `linear` takes any."""
    inner = weight.shape[1]
    if normalized and inner > _WIDEST_NORM:
        return False
    if isinstance(weight, Packed):
        return bool(inner <= 32 * _OWN_GROUPS[-1])
    return bool(inner % 8 == 0 and inner <= _ROW_BLOCKS[-1][0])


def vector_linear(
    device: GPU,
    x: Any,
    weight: Any,
    bias: Any,
    y: Any,
    *,
    accumulate: bool = False,
    norm: Any = None,
    eps: float = 0.0,
    activation: str | None = None,
) -> None:
    """y (N,) float32 = x @ weight.T + bias, or += with accumulate, for x (1, K) and weight (N, K).

    With a norm x is float32 and RMS-normalized. With an activation, silu or gelu, y (N,) is float16, weight (2N, K):
    activation(gate) * up, where the first half of the rows makes the gate.
    """
    inner, outer = x.shape[1], y.shape[0]
    is_packed = isinstance(weight, Packed)
    plan = _of_blocks(weight, norm is not None, activation) if is_packed else _of_floats(inner)
    defines = {
        **plan,
        "IN": "f16" if norm is None else "float",
        "OUT": "float" if activation is None else "f16",
        "SILU": int(activation == "silu"),
    }
    outputs = plan["ROWS"] // (1 if activation is None else 2) * (plan["BLOCK"] // plan.get("TEAM", plan["BLOCK"]))
    groups = -(-outer // outputs)
    most = device.cores * plan["CORE_BLOCKS"]
    blocks = -(-groups // -(-groups // most))
    sizes = (inner, outer, blocks, int(accumulate))
    if is_packed:
        device.run("quant_vector", "quant_vector", blocks, x, norm, eps, *weight.planes, bias, y, *sizes, **defines)
    else:
        device.run("vector", "vector_linear", blocks, x, norm, eps, weight, bias, y, *sizes, **defines)


def _of_floats(inner: int) -> dict[str, int]:
    block, rows, core_blocks = next(plan for most, *plan in _ROW_BLOCKS if inner <= most)
    pieces = -(-inner // (8 * block))
    return {"BLOCK": block, "PIECES": 1 << (pieces - 1).bit_length(), "ROWS": rows, "CORE_BLOCKS": core_blocks}


def _of_blocks(weight: Packed, normalized: bool, activation: str | None) -> dict[str, int]:
    inner = weight.shape[1]
    rows = 2 if activation or (weight.unit == 32 and weight.type.name != "Q8_0") else 1  # 32 bytes on their way
    # A gate and its up need registers, as do a norm behind which several rows wait, and codes in two planes.
    is_large = activation or weight.type.name in _LARGE or (normalized and rows == 2 and inner > 32 * _OWN_GROUPS[0])
    return {
        "FORMAT": int(weight.type),
        "ROWS": rows,
        "TEAM": _TEAM // 2 if weight.type.name in _SMALL_TEAMS else _TEAM,
        "BLOCK": _BLOCK,
        "CORE_BLOCKS": 1 if is_large else 2,
        "OWN": next(most for most in _OWN_GROUPS if inner <= 32 * most),
    }
