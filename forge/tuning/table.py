"""Launch choices as data: block sizes, rows of a block, splits, by kernel, class of shapes and architecture.

Each kernel says on which NVIDIA GPU its rows were `measured`. Nobody has measured on an AMD GPU: what runs there is
known to compute right and to fit, not to be fast. `forge tune` measures on the GPU at hand. Rows that its files
show to be better for an architecture go here, before the others. Its GPUs have names that begin alike: gfx94 is CDNA3,
gfx90a CDNA2, gfx11 RDNA3, gfx12 RDNA4.
"""

from __future__ import annotations

from forge.formats.ggml import BLOCK_FORMATS
from forge.tuning.experts import EXPERT_KERNELS
from forge.tuning.lds import (
    CODEBOOK_BYTES,
    FEW_FORMATS,
    FEW_ROWS,
    FIXED_LDS_BYTES,
    WITHOUT_LINES,
    allows_attention,
    allows_decode,
    allows_few,
    allows_group,
    allows_many,
    allows_prefill,
    allows_quant,
    allows_tma,
)
from forge.tuning.row_table import ONE_SCALE, ROW_KERNELS, allows_matvec_quant
from forge.tuning.spec import ANY, Kernel, Row, Shape, Values

MATMUL_ROWS = (8, 16, 32, 64)
"""Rows of a product that a block of `matmul` takes, in variants up to each of these. More go to further blocks."""
GROUP_ROWS = (*MATMUL_ROWS, 128, 256)
"""The same of kernels that multiply by four waves together; with a float16 matrix the last two are `matmul_tma`'s."""
LINE_ROWS = MATMUL_ROWS[:3]
"""The same of a block of `matmul_wgmma_quant`, which takes no more."""
MANY_ROWS = (32, 64, 128, 256)
"""The same of a block of `matmul_wgmma_quant_many`, whose waves have roles."""
_MMA, _MFMA, _WMMA = ("sm_8", "sm_9", "sm_1"), ("gfx908", "gfx90a", "gfx94", "gfx95"), ("gfx11", "gfx12")
"""Architectures with matrix cores of each family."""
_OPS = ("linear", "rms_linear", "rms_gated")
"""Which op launches a product of one row: alone, behind a norm, or between a norm and a gated activation."""
_OUTER = (8191, 65_535, ANY)
"""Outputs: below 8,192 blocks are few, above 65,535 is a vocabulary."""
_FORMATS = tuple(type.name for type in BLOCK_FORMATS)
_CODEBOOKS = tuple(CODEBOOK_BYTES)
_LINE_FORMATS = tuple(name for name in _FORMATS if name not in WITHOUT_LINES)
_WIDE_CODES = ("Q2_K", "Q3_K", "Q5_K", "Q6_K")  # a thread's share of a block is most
_SLOW_CODES = ("Q2_K", "Q3_K", "IQ4_XS")  # to take their codes apart costs more than to read them


def _matvec_f16(shape: Shape, values: Values) -> bool:
    inner, block, rows = shape["inner"], values["BLOCK"], values["ROWS"]
    pieces = -(-inner // (8 * block))
    if shape["op"] == "rms_gated" and rows % 2:
        return False
    return 8 * block <= max(inner, 512) and 2 <= pieces * rows <= 8 and 512 <= block * values["MIN_BLOCKS"] <= 1024


def _matmul(shape: Shape, values: Values) -> bool:
    """Sums of two tiles and weights ahead take the registers that twice as many threads would have; three stages of x
    fill at most, and a quarter at least, of what a block may have of LDS."""
    threads = values["BLOCK"] * values["MIN_BLOCKS"]
    stage_bytes = values["STAGE_STEPS"] * 128 * max(shape["tokens"], 16)
    is_stage = FIXED_LDS_BYTES // 12 <= stage_bytes <= (FIXED_LDS_BYTES - CODEBOOK_BYTES.get(shape["format"], 0)) // 3
    return is_stage and 256 <= threads <= (512 if values["TILES"] == 1 else 256)


def _norm(shape: Shape, values: Values) -> bool:
    """Fewer threads than a row has pieces of 4 numbers, and at most 8 pieces for each thread."""
    most = values["MAX_THREADS"]
    return most == 1024 or 4 * most < shape["width"] <= 32 * most


KERNELS = {
    "matvec_f16": Kernel(
        classes={"op": _OPS, "inner": (512, 1024, 2048, 4096, 8192, 16_384), "outer": _OUTER},
        # BLOCK threads share a row, 8 numbers at a time, and compute ROWS at a time; there are registers, and the grid
        # is made, for MIN_BLOCKS of a multiprocessor.
        candidates={"BLOCK": (64, 128, 256, 512), "ROWS": (1, 2, 4, 8), "MIN_BLOCKS": (1, 2, 4, 10)},
        allows=_matvec_f16,
        measured="H100: float16, from 2,048 numbers of a row on at the shapes of a 1B and an 8B model, of 64 to 1,024 "
        "threads, 1 to 8 rows, 512 to 2,048 threads of a multiprocessor: 61 to 104% of a copy's rate",
        rows=(
            Row({"inner": 512}, (64, 8, 10)),
            Row({"inner": 1024}, (64, 4, 10)),
            Row({"inner": 2048}, (256, 2, 4)),
            Row({"inner": 8192}, (512, 2, 2)),
            Row({}, (512, 2, 1)),
        ),
    ),
    "matvec_quant": Kernel(
        classes={
            "op": _OPS, "format": _FORMATS, "inner": (1024, 2048, 4096, 8192, 16_384), "outer": (2048, 4096, *_OUTER)
        },
        # THREADS_PER_ROW threads share ROWS rows. Of blocks of 32 two rows are on their way, a gate and its up always.
        # Those need registers, as do codes in two planes, and a norm of a long row behind which two wait.
        candidates={"BLOCK": (256, 512), "THREADS_PER_ROW": (16, 32, 64), "ROWS": (1, 2, 4), "MIN_BLOCKS": (1, 2, 4)},
        allows=allows_matvec_quant,
        measured="H100: BLOCK and THREADS_PER_ROW for Q4_K, Q5_K, Q6_K, Q8_0 and Q4_0 at the shapes of a 1B and an 8B "
        "model, of teams of 16 to 128, 1 to 4 rows of a team, blocks of 128 to 1,024, and 1 and 2 units read ahead; "
        "H200: the rows of sm_90, at the shapes of Qwen3 30B-A3B too",
        rows=(
            Row({"op": ("linear",), "format": ONE_SCALE}, (512, 32, 2, 2)),
            Row({"op": ("rms_linear",), "format": ONE_SCALE, "inner": 4096}, (512, 32, 2, 2)),
            Row({"op": ("rms_linear",), "format": ONE_SCALE}, (512, 32, 2, 1)),
            Row({"op": ("rms_linear",), "format": ("Q4_K",), "inner": 2048, "outer": 4096}, (512, 32, 2, 1), "sm_90"),
            Row({"op": ("rms_linear",), "format": ("Q4_K",), "inner": 2048, "outer": 8191}, (512, 16, 1, 1), "sm_90"),
            Row({"op": ("linear",), "format": ("Q4_K",), "inner": 4096, "outer": 2048}, (512, 64, 2, 1), "sm_90"),
            Row({"op": ("linear", "rms_linear"), "format": ("Q8_0", "Q4_K")}, (512, 32, 1, 2)),
            Row({"op": ("linear", "rms_linear"), "format": ("Q5_K", "Q6_K")}, (512, 32, 1, 1)),
            Row({"op": ("linear", "rms_linear"), "format": ("Q3_K",)}, (512, 16, 1, 1)),
            Row({"op": ("linear", "rms_linear"), "format": ("Q2_K", "IQ4_XS")}, (512, 16, 1, 2)),
            Row({"format": _SLOW_CODES}, (512, 16, 2, 1)),
            Row({}, (512, 32, 2, 1)),
        ),
    ),
    "matmul": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": ("F16", *_FORMATS),
            "outer": (2048, 4095, 8191, 8448, 65_535, ANY), "tokens": MATMUL_ROWS,
        },
        # TILES of 16 outputs of a wave, BLOCK threads, the weights of the turn PREFETCH under way, registers for
        # MIN_BLOCKS of a multiprocessor, which slices of the inner dimension are to fill, and STAGE_STEPS of x
        # together.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256), "PREFETCH": (0, 1), "MIN_BLOCKS": (1, 2, 4),
            "STAGE_STEPS": (1, 2, 4, 8),
        },
        allows=_matmul,
        measured="H100: F16, Q4_K and Q6_K at the shapes of a 1B and an 8B model, 8 and 64 rows, of 1 and 2 tiles, "
        "blocks of 2, 4 and 8 waves, up to 3 turns ahead, 1 to 8 blocks of a multiprocessor, 3 and 4 stages. Two "
        "tiles, whose sums leave RDNA too few registers, and a block alone are for the H100 only",
        rows=(
            Row({"tokens": 16}, (1, 256, 1, 2, 4)),
            Row({"format": _CODEBOOKS}, (1, 256, 0, 2, 1), "sm_90"),
            # a block for each multiprocessor, which no other is to share
            Row({"op": ("rms_gated",), "outer": 8448}, (1, 256, 1, 1, 2), "sm_90"),
            Row({"format": _WIDE_CODES}, (2, 256, 0, 1, 2), "sm_90"),  # more would not fit the registers
            Row({"op": ("rms_gated",), "format": _FORMATS}, (2, 256, 1, 1, 2), "sm_90"),
            Row({"op": ("linear",), "format": ("F16",), "outer": 8191, "tokens": 32}, (1, 128, 0, 4, 2)),
            Row({"tokens": 32}, (1, 256, 0, 2, 2)),
            Row({"op": ("linear",), "format": ("F16",), "outer": 8191}, (1, 128, 0, 4, 1)),
            Row({}, (1, 256, 0, 2, 1)),
        ),
    ),
    "matmul_wgmma": Kernel(
        classes={"op": ("linear", "rms_gated"), "outer": (2048, 4095, 4096, 8191, ANY), "tokens": MATMUL_ROWS},
        # Of LDS as much as is there goes to MIN_BLOCKS of a multiprocessor, STAGES of STAGE_STEPS lines each.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256), "MIN_BLOCKS": (1, 2, 3, 4), "STAGE_STEPS": (1, 2), "STAGES": (3, 4)
        },
        allows=allows_group,
        measured="H100, of the one architecture that launches it: at the shapes of a 1B and an 8B model, 8 and 64 "
        "rows, of 1 to 4 tiles, 1 to 4 groups of waves, 1 to 5 blocks, 3 to 8 stages of 1 and 2 steps",
        rows=(
            # of some numbers of outputs three blocks, or slices of them, leave the fewest multiprocessors less to do
            Row({"outer": 2048}, (1, 128, 2, 2, 3)),
            Row({"outer": 4095}, (1, 128, 3, 1, 4)),
            Row({"outer": 4096}, (1, 128, 2, 2, 3)),
            Row({"outer": 8191}, (1, 128, 3, 1, 4)),
            Row({}, (1, 128, 2, 2, 3)),
        ),
    ),
    "matmul_tma": Kernel(
        classes={"op": ("linear", "rms_gated"), "outer": (4095, 4096, 8448, ANY), "tokens": GROUP_ROWS[-2:]},
        # Groups of waves of BLOCK threads that multiply have TILES of 64 rows each. A block takes TOKENS rows of x.
        # What SPLITS of the inner dimension write is read again.
        candidates={"TILES": (1, 2), "BLOCK": (256, 384), "TOKENS": GROUP_ROWS[-3:], "SPLITS": (1, 2, 4, 8)},
        allows=allows_tma,
        measured="H200: at the shapes of a 1B and an 8B model, 65, 128, 129 and 256 rows",
        rows=(
            Row({"op": ("rms_gated",), "tokens": 128}, (1, 256, 128, 1)),
            Row({"op": ("rms_gated",)}, (1, 256, 256, 1)),
            Row({"outer": 4096, "tokens": 128}, (1, 256, 128, 8)),
            Row({"tokens": 128}, (1, 256, 128, 2)),
            Row({"outer": 4095}, (1, 256, 128, 4)),
            Row({"outer": 4096}, (1, 256, 256, 4)),
            Row({"outer": 8448}, (1, 256, 128, 1)),
            Row({}, (1, 256, 256, 4)),
        ),
    ),
    "quant_product": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": FEW_FORMATS, "outer": (4096, 8192, ANY), "tokens": FEW_ROWS
        },
        # By groups of four waves, `matmul_wgmma_quant`, or by each wave alone, `matmul_mma_quant`.
        candidates={"GROUPS": (0, 1)},
        allows=lambda shape, values: True,
        measured="H200: as matmul_mma_quant",
        rows=(
            Row({"tokens": 8}, (0,)),
            Row({"op": ("rms_gated",), "format": ("Q8_0",), "outer": 8192}, (0,)),
            Row({"format": ("Q8_0",)}, (1,)),
            Row({"op": ("rms_gated",)}, (0,)),
            Row({"outer": 4096}, (0,)),
            Row({}, (1,)),
        ),
    ),
    "matmul_mma_quant": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": FEW_FORMATS, "outer": (4095, 4096, 8191, 8192, ANY),
            "tokens": FEW_ROWS,
        },
        # A wave has TILES of 16 outputs. STAGES of 256 weights of each are in LDS, and X_PLACES of as many numbers of 8
        # rows of x. MIN_BLOCKS of a multiprocessor.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256, 448), "MIN_BLOCKS": (1, 2, 3, 4, 5), "STAGES": (2, 3, 4),
            "X_PLACES": (4, 8, 16),
        },
        allows=allows_few,
        measured="H200: 30 choices at 8 and 16 rows, of Q4_K, Q6_K, Q4_0 and Q8_0, and the shapes of a 1B, a 3B and an "
        "8B model: within 8% of the best of each",
        rows=(
            Row({"format": ("Q4_K", "Q5_K"), "op": ("linear",), "outer": 4095, "tokens": 8}, (1, 128, 3, 3, 4)),
            Row({"outer": 4095}, (1, 256, 1, 3, 8)),
            Row({"op": ("rms_gated",), "outer": 8192}, (1, 256, 1, 3, 8)),
            Row({"outer": 4096, "tokens": 8}, (1, 256, 2, 2, 8)),
            Row({"outer": 4096}, (2, 256, 1, 2, 8)),
            Row({"format": ("Q4_K", "Q5_K"), "op": ("linear",), "outer": 8191, "tokens": 8}, (1, 128, 3, 3, 4)),
            Row({"format": ("Q6_K", "Q8_0"), "outer": 8191, "tokens": 8}, (1, 128, 3, 2, 4)),
            Row({"format": ("Q8_0",), "outer": 8191}, (2, 256, 1, 2, 8)),
            Row({"outer": 8191}, (2, 128, 3, 2, 4)),
            Row({"format": ("Q8_0",), "tokens": 8}, (1, 256, 2, 2, 8)),
            Row({"format": ("Q6_K",), "tokens": 8}, (2, 128, 2, 3, 4)),
            Row({"op": ("linear",), "format": ("Q4_0", "Q4_K"), "tokens": 8}, (2, 256, 2, 2, 8)),
            Row({"tokens": 8}, (2, 256, 1, 3, 16)),
            Row({}, (2, 256, 1, 2, 16)),
        ),
    ),
    "matmul_wgmma_quant": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": _LINE_FORMATS, "outer": (2048, ANY), "tokens": LINE_ROWS
        },
        # A wave has TILES of 16 outputs. STAGES of 256 weights of each are in LDS. MIN_BLOCKS of a multiprocessor.
        candidates={"TILES": (1, 2), "BLOCK": (128, 256), "MIN_BLOCKS": (1, 2, 3, 4), "STAGES": (2, 3, 4)},
        allows=allows_quant,
        measured="H200: all of 2 and 3 stages at 8 rows, of Q4_K, Q6_K, Q8_0 and Q4_0, 14336, 6144 and 2048 outputs; "
        "the rest is what fits",
        rows=(
            Row({"outer": 2048, "tokens": 16}, (1, 128, 3, 3)),
            Row({"format": ("Q8_0",)}, (2, 128, 2, 2)),
            Row({"format": ("Q4_0", "Q4_K"), "tokens": 16}, (2, 128, 4, 2)),
            Row({"tokens": 16}, (2, 128, 3, 2)),
            Row({}, (2, 128, 2, 2)),
        ),
    ),
    "matmul_wgmma_quant_many": Kernel(
        classes={
            "op": ("linear", "rms_gated"), "format": _LINE_FORMATS, "outer": (4096, 8191, ANY), "tokens": MANY_ROWS[1:]
        },
        # As matmul_wgmma_quant, of waves that multiply: BLOCK threads. A block takes TOKENS rows of x.
        candidates={
            "TILES": (1, 2), "BLOCK": (128, 256, 384, 512), "MIN_BLOCKS": (1, 2), "STAGES": (2, 3),
            "TOKENS": MANY_ROWS
        },
        allows=allows_many,
        measured="H200: up to 8 choices at 64, 128 and 256 rows, of Q4_K and Q6_K, at the shapes of an 8B model. "
        "Blocks of 512 threads win 1% with a gate of 14,336, and leave multiprocessors idle with others",
        rows=(
            Row({"outer": 8191, "tokens": 64}, (1, 384, 1, 2, 64)),
            Row({"op": ("linear",), "format": _WIDE_CODES, "tokens": 64}, (2, 256, 1, 2, 64)),
            Row({"format": _WIDE_CODES, "tokens": 64}, (1, 128, 2, 3, 64)),
            Row({"tokens": 64}, (1, 256, 2, 2, 64)),
            Row({"outer": 4096, "tokens": 128}, (1, 256, 1, 2, 128)),
            Row({"format": _WIDE_CODES, "outer": 4096}, (1, 256, 1, 2, 256)),
            Row({"outer": 4096}, (1, 256, 1, 2, 128)),
            Row({"format": _WIDE_CODES, "outer": 8191, "tokens": 256}, (1, 256, 1, 2, 128)),
            Row({"outer": 8191, "tokens": 256}, (1, 384, 1, 2, 128)),
            Row({"tokens": 128}, (1, 256, 1, 2, 128)),
            Row({}, (1, 256, 1, 2, 256)),
        ),
    ),
    "product": Kernel(
        classes={"format": ("F16", *_FORMATS), "outer": (4096, ANY), "rows": (512, 1024, 2048, ANY)},
        # Products of more rows than GROUP_ROWS, where there is a BLAS: by it, blocks converted to float16 before, or
        # by the kernels above, in blocks of rows.
        candidates={"BLAS": (0, 1)},
        allows=lambda shape, values: True,
        measured="not measured: as before there was a choice",
        rows=(Row({}, (1,)),),
    ),
    "attention_decode": Kernel(
        classes={"dim": (32, 64, 96, 128, 256), "packed": (1, 2, 3, 4), "rows": (1, 16, ANY)},
        # THREADS of a block, POSITIONS: tiles of 16 whose keys and values are on their way together for each of its
        # waves, MIN_BLOCKS that fill a multiprocessor, as many as there are registers for. Parts of the context smaller
        # than MIN_SPAN positions cost more to join than they save.
        candidates={"THREADS": (128, 256), "POSITIONS": (1, 2), "MIN_BLOCKS": (1, 2, 4), "MIN_SPAN": (64, 128)},
        allows=allows_decode,
        measured="H100: of 128 to 512 threads, 1 to 4 tiles of positions and 1 to 6 blocks of a multiprocessor, at 1 "
        "to 64 sequences of 1,024 to 32,768 positions and heads of 64 and 128; H200: rows of NVIDIA alone",
        rows=(
            Row({"dim": 64, "rows": 1}, (256, 1, 2, 64)),
            Row({"dim": 64, "rows": 16}, (256, 2, 1, 128), _MMA),
            Row({"dim": 64, "rows": 16}, (256, 1, 2, 64)),
            Row({"rows": 16}, (256, 1, 1, 64)),
            Row({"dim": 128}, (128, 1, 4, 64)),
            Row({}, (128, 1, 2, 64), _MMA),
            Row({}, (256, 1, 1, 64)),
        ),
    ),
    "attention_wgmma": Kernel(
        classes={"dim": (64, 80, 96, 128, 192, 256), "rows": (1, ANY)},
        # KEYS of a tile, of which STAGES are in LDS; a group of BLOCK's waves copies, the others have 64 rows each.
        # PERSISTENT blocks, one for each multiprocessor, take several tiles of queries. Those of one sequence cost what
        # their place in the grid says, those of several may not, and the GPU gives them to whoever is free.
        candidates={
            "KEYS": (64, 80, 96, 128), "STAGES": (2, 3), "BLOCK": (384, 512), "PERSISTENT": (0, 1)
        },
        allows=allows_attention,
        measured="H200: prompts of 2,048 to 32,768 tokens, and 8 of 512 (D64 and D128)",
        rows=(
            Row({"dim": 64, "rows": 1}, (128, 2, 512, 1)),
            Row({"dim": 64}, (96, 3, 512, 1)),
            Row({"dim": 128, "rows": 1}, (128, 2, 384, 1)),
            Row({"dim": 128}, (128, 2, 384, 0)),
            Row({"dim": 192, "rows": 1}, (96, 2, 384, 1)),
            Row({"dim": 192}, (96, 2, 384, 0)),
            Row({"rows": 1}, (80, 2, 384, 1)),
            Row({}, (80, 2, 384, 0)),
        ),
    ),
    "attention_prefill": Kernel(
        classes={"dim": (64, 96, 128, 192, 256, 512)},
        # Waves take QUERIES rows, KEYS positions at a time. There are registers for MIN_BLOCKS of a multiprocessor.
        candidates={"QUERIES": (16, 32), "KEYS": (16, 32, 64), "WAVES": (4, 8), "MIN_BLOCKS": (1, 2)},
        allows=allows_prefill,
        measured="not measured: as much as the registers and the LDS of each family take without spills",
        rows=(
            Row({"dim": 64}, (32, 64, 4, 2), _MMA),
            Row({"dim": 128}, (32, 32, 4, 2), _MMA),
            Row({}, (32, 16, 4, 1), _MMA),
            Row({"dim": 128}, (32, 64, 4, 1), _MFMA),
            Row({"dim": 256}, (32, 32, 4, 1), _MFMA),
            Row({"dim": 128}, (16, 16, 4, 1), "gfx10"),
            Row({"dim": 128}, (16, 32, 4, 1)),
            Row({"dim": 256}, (16, 32, 8, 1), _WMMA),
            Row({}, (16, 16, 8, 1), _WMMA),
            Row({}, (16, 16, 4, 1)),
        ),
    ),
    "norm": Kernel(
        classes={"width": (1024, 2048, 4096, 8192, 16_384, ANY)},
        candidates={"MAX_THREADS": (256, 512, 1024)},
        allows=_norm,
        measured="not measured against others: as many threads as a block may have, up to one for 4 numbers",
        rows=(Row({}, (1024,)),),
    ),
} | EXPERT_KERNELS | ROW_KERNELS  # fmt: skip
