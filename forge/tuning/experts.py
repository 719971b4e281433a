"""Launch choices of products of experts, as `tuning.table` has those of other kernels."""

from __future__ import annotations

from forge.tuning.lds import FEW_FORMATS, FEW_ROWS, allows_experts
from forge.tuning.spec import ANY, Kernel, Row

_WIDE_CODES = ("Q8_0", "Q5_K", "Q6_K")  # a thread's share of a block is most

EXPERT_KERNELS = {
    "expert_mma_quant": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": FEW_FORMATS, "inner": (1024, 2048, ANY), "tokens": FEW_ROWS
        },
        # As matmul_mma_quant. A wave takes ROUNDS times its tiles of a matrix, one after the other.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256), "MIN_BLOCKS": (1, 2, 3, 4), "STAGES": (2, 3),
            "X_PLACES": (4, 8, 16), "ROUNDS": (1, 2),
        },
        allows=allows_experts,
        measured="not measured: as much as is on its way for a product of 8 rows",
        rows=(
            Row({"format": _WIDE_CODES, "inner": 1024, "tokens": 8}, (1, 128, 3, 2, 4, 2)),
            Row({"inner": 1024, "tokens": 8}, (1, 128, 4, 3, 4, 2)),
            Row({"format": _WIDE_CODES, "tokens": 8}, (1, 128, 3, 2, 8, 1)),
            Row({"tokens": 8}, (1, 128, 3, 3, 8, 1)),
            Row({"inner": 1024}, (1, 128, 2, 3, 8, 1)),
            Row({"format": _WIDE_CODES}, (1, 128, 2, 2, 16, 1)),
            Row({}, (1, 128, 2, 3, 16, 1)),
        ),
    ),
}  # fmt: skip
