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

# To be tuned.
_ROW_BLOCKS = (
    *((512, 64, 8, 10), (1024, 64, 4, 10), (2048, 128, 4, 5), (4096, 256, 4, 2)),
    *((8192, 512, 4, 1), (16_384, 512, 2, 1)),
)
"""float16: numbers of a row at most; threads of a block, which share the row, 8 numbers at a time; rows that they
compute at a time; blocks of a multiprocessor, for which there are registers and the grid is made. A thread has 8 loads
of 16 bytes on their way: numbers / threads / 8 * rows."""
_WIDEST_NORM = 8192
"""Threads that hold more than 16 numbers of a row have no registers for the norm's."""
_CORE_THREADS = {"Q3_K": 512, "Q5_K": 640, "Q6_K": 640}
_CORE_THREADS_OF_OTHERS = 1024
"""Blocks of weights: threads of a multiprocessor, for which there are registers and the grid is made."""
_MANY_OUTPUTS = 8192
"""From so many outputs threads may read two units ahead."""
_ONE_ROW = {
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ4_XS"), (16, 1, 512, 1)),  # to take their codes apart costs more than to read
    **dict.fromkeys(("Q5_K", "Q6_K"), (32, 1, 640, 1)),
    "Q4_K": (32, 1, 512, 2),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q8_0", "IQ4_NL"), (64, 2, 512, 1)),  # no registers for more
}
_ONE_ROW_OF_OTHERS = (64, 2, 512, 2)
"""Blocks: threads that share rows of the matrix (a team), rows of a team, threads of a block, units that a thread reads
ahead where there are many outputs."""
_GATED_BLOCK = 512
"""Threads of a block, the only one of a multiprocessor, of a gated product with blocks: a team computes two rows, a
gate and its up, and has the registers for it."""


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
    plan = _of_blocks(weight, outer, norm is not None, activation) if is_packed else _of_floats(inner)
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
        device.run("quant", "quant_vector", blocks, x, norm, eps, *weight.planes, bias, y, *sizes, **defines)
    else:
        device.run("vector", "vector_linear", blocks, x, norm, eps, weight, bias, y, *sizes, **defines)


def _of_floats(inner: int) -> dict[str, int]:
    block, rows, core_blocks = next(plan for most, *plan in _ROW_BLOCKS if inner <= most)
    pieces = -(-inner // (8 * block))
    return {"BLOCK": block, "PIECES": 1 << (pieces - 1).bit_length(), "ROWS": rows, "CORE_BLOCKS": core_blocks}


def _of_blocks(weight: Packed, outer: int, normalized: bool, activation: str | None) -> dict[str, int]:
    inner = weight.shape[1]
    team, rows, block, ahead = _ONE_ROW.get(weight.type.name, _ONE_ROW_OF_OTHERS)
    if activation is not None:
        rows, block = 2, _GATED_BLOCK
    if outer < _MANY_OUTPUTS or normalized:  # no registers for more
        ahead = 1
    core_threads = _CORE_THREADS.get(weight.type.name, _CORE_THREADS_OF_OTHERS)
    is_large = activation is not None or (normalized and rows == 2 and inner > 32 * _OWN_GROUPS[0])
    if inner < team * weight.unit:
        team = min(team, 32)
    return {
        "FORMAT": int(weight.type),
        "MOST": 1,
        "ROWS": rows,
        "TEAM": team,
        "BLOCK": block,
        "AHEAD": ahead,
        "CORE_BLOCKS": 1 if is_large else core_threads // block,
        "OWN": next(most for most in _OWN_GROUPS if inner <= 32 * most),
    }
