"""Products of one row with quantized matrices: which choices a launch may have, and the table's rows for experts."""

from __future__ import annotations

from forge.formats.ggml import BLOCK_FORMATS, GGMLType
from forge.tuning.spec import Kernel, Row, Shape, Values

ONE_SCALE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "Q4_G32", "Q4_G128")  # 32 weights of a thread
_FORMATS = tuple(type.name for type in BLOCK_FORMATS)


def allows_matvec_quant(shape: Shape, values: Values) -> bool:
    """Of `matvec_quant`."""
    block = values["BLOCK"]
    if 32 * block < shape["inner"]:  # a thread makes digits of 32 numbers at most
        return False
    rows = (2, 4) if shape["op"] == "rms_gated" else (1, 2)
    return values["ROWS"] in rows and 512 <= block * values["MIN_BLOCKS"] <= 1024


def _expert_row(shape: Shape, values: Values) -> bool:
    """A thread has registers for what is on its way, and not many turns in which some have nothing to do."""
    units = shape["inner"] // BLOCK_FORMATS[GGMLType[shape["format"]]].weights_per_thread
    turns = -(-units // values["THREADS_PER_ROW"])
    return turns * values["ROWS"] <= 8 and 512 <= values["BLOCK"] * values["MIN_BLOCKS"] <= 1024


ROW_KERNELS = {
    "expert_up": Kernel(
        classes={"format": _FORMATS, "inner": (2048, 4096, 8192, 16_384)},
        # As matvec_quant, of an expert's outputs. All units that a thread has of ROWS rows are on their way together.
        candidates={"BLOCK": (256, 512), "THREADS_PER_ROW": (32, 64, 128), "ROWS": (2, 4), "MIN_BLOCKS": (1, 2, 3, 4)},
        allows=_expert_row,
        measured="H200: 10 choices at the shapes of Qwen3 30B-A3B, Q4_K, and gpt-oss 20B, MXFP4; the rest is what fits",
        rows=(
            Row({"format": ("Q4_K", *ONE_SCALE), "inner": 4096}, (256, 32, 2, 3)),
            Row({"inner": 4096}, (256, 32, 2, 2)),
            Row({"inner": 8192}, (256, 64, 2, 2)),
            Row({}, (512, 128, 2, 1)),
        ),
    ),
    "expert_down": Kernel(
        classes={"format": _FORMATS, "inner": (4096, 8192, 16_384)},
        # The same; inner: Of all experts of a token together.
        candidates={"BLOCK": (256, 512), "THREADS_PER_ROW": (32, 64, 128), "ROWS": (1, 2, 4), "MIN_BLOCKS": (1, 2, 3)},
        allows=_expert_row,
        measured="H200: as expert_up, and Q6_K",
        rows=(
            Row({"format": ONE_SCALE, "inner": 4096}, (512, 32, 1, 1)),
            Row({"format": ONE_SCALE}, (512, 128, 2, 1)),
            Row({"inner": 8192}, (256, 64, 1, 2)),
            Row({}, (512, 128, 1, 1)),
        ),
    ),
}  # fmt: skip
