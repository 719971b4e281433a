"""Launches of the matrix-vector kernels: products of one row, what a decode step of one sequence spends its time on.

The kernels may normalize the row first and have a gated activation behind the product: two launches less.
"""

from __future__ import annotations

from typing import Any

from forge.backend.gpu import GPU
from forge.ops.norm import Normed
from forge.ops.quant import Packed
from forge.tuning.lds import row_groups

_MAX_WIDTH = 16_384
"""Numbers of a row that the threads of a block hold in registers, where the matrix is float16."""
_MAX_NORMED_WIDTH = 8192
"""The same with a norm: threads that hold more than 16 numbers have no registers for the norm's."""


def supports(weight: Any, *, normed: bool = False) -> bool:
    """Whether the kernels take a matrix; with `normed`, for a row that they normalize."""
    inner = weight.shape[1]
    if normed and inner > _MAX_NORMED_WIDTH:
        return False
    if isinstance(weight, Packed):
        return bool(inner <= 32 * row_groups(weight.type.name)[-1])
    return bool(inner % 8 == 0 and inner <= _MAX_WIDTH)


def matvec(
    device: GPU,
    operand: Any,
    weight: Any,
    bias: Any,
    y: Any,
    *,
    accumulate: bool = False,
    glu: str = "none",
    part: int = 0,
) -> None:
    """y = operand @ weight.T + bias, or += with accumulate.

    operand: act (1, K), or Normed with an RMS norm and nothing pending. weight: (N, K). bias: float32 (N,) or None.
    part: Of products of the same row whose launches follow each other: 1 for the first of them, 2 for the others. Then
    matrices are quantized.
    y: float32 (N,). With glu, silu or gelu: act (N / 2,), the activation of the product's first half times the second.
    """
    is_normed, is_packed, is_glu = isinstance(operand, Normed), isinstance(weight, Packed), glu != "none"
    x, norm, eps = (operand.x, operand.weight, operand.eps) if is_normed else (operand, None, 0.0)
    inner, outer = x.shape[1], y.shape[0]
    shape = {"op": "rms_gated" if is_glu else "rms_linear" if is_normed else "linear", "inner": inner, "outer": outer}
    if is_packed:
        choice = {**device.choice("matvec_quant", format=weight.type.name, **shape), "FORMAT": int(weight.type)}
        choice["AHEAD"], choice["PART"] = _ahead(weight, inner, is_gated=is_glu), part
        choice["MAX_GROUPS"] = next(most for most in row_groups(weight.type.name) if inner <= 32 * most)
    else:
        choice = {**device.choice("matvec_f16", **shape)}
        choice["PIECES"] = 1 << (-(-inner // (8 * choice["BLOCK"])) - 1).bit_length()
    defines: dict[str, int | str] = {
        **choice,
        "IN": "float" if is_normed else "f16",
        "OUT": "f16" if is_glu else "float",
        "SILU": int(glu == "silu"),
    }
    teams = choice["BLOCK"] // choice.get("THREADS_PER_ROW", choice["BLOCK"])
    outputs = choice["ROWS"] // (2 if is_glu else 1) * teams
    groups = -(-outer // outputs)
    max_blocks = device.num_cus * choice["MIN_BLOCKS"]
    blocks = -(-groups // -(-groups // max_blocks))
    sizes = (inner, outer, blocks, int(accumulate))
    kernel, planes = ("matvec_quant", weight.planes) if is_packed else ("matvec_f16", (weight,))
    device.run(kernel, kernel, blocks, x, norm, eps, *planes, bias, y, *sizes, **defines)


def _ahead(weight: Any, inner: int, *, is_gated: bool) -> int:
    """Units of a row that a thread has under way: two, or one where more cost registers and gain nothing.

    Measured on an H200, Q4_K, Q6_K and Q8_0 at the shapes of an 8B model and of two mixtures of experts.
    """
    is_small = weight.weights_per_thread == 32
    return 2 if is_small or (not is_gated and not 2048 < inner <= 8192) else 1
