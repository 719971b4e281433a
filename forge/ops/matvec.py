"""How kernels multiply one row with a matrix: what a decode step of one sequence spends most of its time on.

The row may be the residual stream's, which each block then normalizes, and the result may go through a gated
activation: a launch less before the product, and one less behind it.
"""

from __future__ import annotations

from typing import Any

from forge.backend.gpu import GPU
from forge.ops.quant import Packed

_OWN_GROUPS = (128, 256, 512)
"""With blocks, a row becomes digits in LDS, which keeps room for one of these numbers of groups of 32."""

_WIDEST = 16_384
"""float16: numbers of a row at most, which the threads of a block hold in registers."""
_WIDEST_NORM = 8192
"""Threads that hold more than 16 numbers of a row have no registers for the norm's."""


def fits(weight: Any, *, normalized: bool = False) -> bool:
    """Whether a matrix has these kernels, `normalized` those that begin with a norm; `linear` takes any."""
    inner = weight.shape[1]
    if normalized and inner > _WIDEST_NORM:
        return False
    if isinstance(weight, Packed):
        return bool(inner <= 32 * _OWN_GROUPS[-1])
    return bool(inner % 8 == 0 and inner <= _WIDEST)


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
    op = "linear" if norm is None else "rms_linear" if activation is None else "rms_gated"
    shape = {"op": op, "inner": inner, "outer": outer}
    if is_packed:
        plan = {**device.choice("matvec_quant", format=weight.type.name, **shape), "FORMAT": int(weight.type)}
        plan["MAX_GROUPS"] = next(most for most in _OWN_GROUPS if inner <= 32 * most)
    else:
        plan = {**device.choice("matvec_f16", **shape)}
        plan["PIECES"] = 1 << (-(-inner // (8 * plan["BLOCK"])) - 1).bit_length()
    defines: dict[str, int | str] = {
        **plan,
        "IN": "f16" if norm is None else "float",
        "OUT": "float" if activation is None else "f16",
        "SILU": int(activation == "silu"),
    }
    outputs = (
        plan["ROWS"] // (1 if activation is None else 2) * (plan["BLOCK"] // plan.get("THREADS_PER_ROW", plan["BLOCK"]))
    )
    groups = -(-outer // outputs)
    most = device.num_cus * plan["MIN_BLOCKS"]
    blocks = -(-groups // -(-groups // most))
    sizes = (inner, outer, blocks, int(accumulate))
    if is_packed:
        device.run("matvec_quant", "matvec_quant", blocks, x, norm, eps, *weight.planes, bias, y, *sizes, **defines)
    else:
        device.run("matvec_f16", "matvec_f16", blocks, x, norm, eps, weight, bias, y, *sizes, **defines)
