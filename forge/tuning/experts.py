"""Launch choices of products of experts, as `tuning.table` has those of other kernels."""

from __future__ import annotations

from forge.tuning.lds import FEW_FORMATS, allows_experts
from forge.tuning.spec import ANY, Kernel, Row

_WIDE_CODES = ("Q8_0", "Q5_K", "Q6_K")  # a thread's share of a block is most

EXPERT_KERNELS = {
    "expert_mma_quant": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": FEW_FORMATS, "inner": (1024, 2048, ANY), "rows": (16, ANY)
        },
        # As matmul_mma_quant. A wave takes ROUNDS times its tiles of a matrix, one after the other.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256), "MIN_BLOCKS": (1, 2, 3, 4), "STAGES": (2, 3),
            "X_PLACES": (4, 8), "ROUNDS": (1, 2),
        },
        allows=allows_experts,
        measured="H200: up to 18 choices at 8 and 64 rows of Qwen3 30B-A3B (Q4_K and Q6_K), and at 8 of gpt-oss-20b",
        rows=(
            Row({"format": ("Q8_0",), "inner": 1024}, (1, 128, 3, 2, 4, 2)),
            Row({"inner": 1024, "rows": 16}, (1, 128, 4, 2, 4, 1)),
            Row({"inner": 1024}, (1, 128, 4, 2, 4, 2)),
            Row({"format": _WIDE_CODES}, (1, 128, 3, 2, 8, 1)),
            Row({"inner": 2048, "rows": 16}, (1, 128, 3, 3, 8, 1)),
            Row({"format": ("Q4_K",), "inner": 2048}, (2, 128, 3, 2, 8, 1)),
            Row({"inner": 2048}, (1, 256, 2, 3, 8, 1)),
            Row({}, (1, 256, 2, 2, 8, 1)),
        ),
    ),
}  # fmt: skip
