"""What blocks of kernels have of LDS, and which choices of products and attention fit a multiprocessor."""

from __future__ import annotations

from forge.formats.ggml import BLOCK_FORMATS, GGMLType
from forge.tuning.spec import Shape, Values

FEW_FORMATS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "Q4_G32", "Q4_G128")
"""What `matmul_mma_quant` multiplies: codes below an exponent are float16 numbers by one or two instructions."""
FEW_ROWS = (8, 16)
"""Rows of x that a block of it takes, in variants up to each of these."""
CODEBOOK_BYTES = {"IQ2_XXS": 1 << 10, "IQ2_XS": 2 << 10, "IQ2_S": 4 << 10, "IQ3_XXS": 1 << 10, "IQ3_S": 2 << 10}
CODEBOOK_BYTES |= dict.fromkeys(("IQ1_S", "IQ1_M"), 8 << 10)
"""What the codebooks of formats take of LDS."""
WITHOUT_LINES = (*CODEBOOK_BYTES, "Q1_0", "Q2_0")
"""Formats with codebooks (llama.cpp's i-quants) or of one or two bits: `matmul` multiplies them on Hopper, too, where
the others have kernels that read lines of 256 weights."""
FIXED_LDS_BYTES = 48 << 10
"""What a block may have of LDS where it is declared with a fixed size: NVIDIA's limit, below AMD's 64 KiB."""
_MAX_LDS_BYTES = 99 << 10
"""What a block may have of LDS where a launch allots it: the least limit of NVIDIA's GPUs from sm_80 on."""


def row_groups(format: str) -> tuple[int, ...]:
    """Groups of 32 numbers of a row for which LDS has room beside a codebook, in variants of vector products up to
    each of these."""
    return 128, 256, 512 if CODEBOOK_BYTES.get(format, 0) < 4 << 10 else 448


def group_lds_bytes(tokens: int, values: Values) -> int:
    """What a block of `matmul_wgmma` has of LDS: STAGES of STAGE_STEPS times 64 numbers of each of its rows."""
    rows_of_block = 16 * values["TILES"] * values["BLOCK"] // 32
    return values["STAGES"] * values["STAGE_STEPS"] * 128 * (tokens + rows_of_block)


def tma_lds(values: Values) -> dict[str, int]:
    """What a block of `matmul_tma` has of LDS, LDS_BYTES: as many STAGES of 64 numbers of each of its rows, up to 8, as
    have room, and 1 KB for barriers."""
    stage = 128 * (values["TILES"] * values["BLOCK"] // 2 + values["TOKENS"])
    stages = min((226 << 10) // stage, 8)
    return {"STAGES": stages, "LDS_BYTES": stages * stage + 1024}


def stage_bytes(format: str, values: Values) -> int:
    """Of STAGES of 256 weights of a block's rows of the matrix: planes with whole pieces of 16 bytes."""
    type = GGMLType[format]
    widths = (field[1] - field[0] for field in BLOCK_FORMATS[type].planes if field)
    row_bytes = sum(size for width in widths if (size := width * 256 // type.block_size) % 16 == 0)
    return values["STAGES"] * 16 * values["TILES"] * values["BLOCK"] // 32 * row_bytes


def few_lds_bytes(format: str, values: Values) -> int:
    """Of a block of `matmul_mma_quant`: its stages, and X_PLACES of 256 numbers of 8 rows of x with the sums of 8
    groups of them, or of 16."""
    of_place = 8 * 2 * 256 + (1024 if format == "Q6_K" else 512) + 256
    return stage_bytes(format, values) + values["X_PLACES"] * of_place


def quant_lds_bytes(format: str, tokens: int, values: Values) -> int:
    """What a block of `matmul_wgmma_quant` has of LDS: STAGES of 256 weights of its rows of the matrix, and x twice.

    Planes with whole pieces of 16 bytes in 256 weights go through LDS.
    """
    x_bytes = 2 * 128 * 4 * tokens
    return -(-(stage_bytes(format, values) + x_bytes) // 1024) * 1024


def many_lds(format: str, values: Values, more: int = 0) -> dict[str, int]:
    """What a block of `matmul_wgmma_quant_many` has of LDS, LDS_BYTES: STAGES of 256 weights of its rows of the matrix,
    and X_STAGES of X_QUARTERS times 64 numbers of each of TOKENS rows of x: two lines of 256 where they have room, else
    as many quarters as have. more: Bytes beside these, at most 1 KB."""
    weights, x_bytes = stage_bytes(format, values), 128 * values["TOKENS"]
    room = (228 << 10) // values["MIN_BLOCKS"] - (2 << 10)  # of a multiprocessor, but 1 KB each for driver and barriers
    room -= (1 << 10) if more else 0
    quarters = min(max((room - weights) // x_bytes, 0), 8)
    together = 4 if quarters == 8 else 1
    stages = quarters // together
    lds_bytes = -(-(weights + stages * (together * x_bytes + 16) + more) // 1024) * 1024
    return {"X_STAGES": stages, "X_QUARTERS": together, "LDS_BYTES": lds_bytes}


def attention_lds_bytes(dim: int, values: Values) -> int:
    """What a block of `attention_wgmma` has of LDS: lines of 64 numbers of its queries and of STAGES of keys and
    values, and 1 KB for its barriers."""
    queries = 64 * (values["BLOCK"] // 128 - 1)
    return 128 * -(-dim // 64) * (queries + 2 * values["STAGES"] * values["KEYS"]) + 1024


def _fits_core(shape: Shape, values: Values, lds_bytes: int) -> bool:
    """All blocks of a multiprocessor have room in LDS, of which 1 KB of each is the driver's, and much is under way.

    Their sums, with as many registers for other things, have room too.
    """
    threads = values["MIN_BLOCKS"] * values["BLOCK"]
    registers = threads * (64 + values["TILES"] * shape["tokens"] // 2)
    return 60 << 10 <= values["MIN_BLOCKS"] * (lds_bytes + 1024) <= 228 << 10 and registers <= 65_536


def allows_group(shape: Shape, values: Values) -> bool:
    """Of `matmul_wgmma`."""
    lds_bytes, threads = group_lds_bytes(shape["tokens"], values), values["MIN_BLOCKS"] * values["BLOCK"]
    return 256 <= threads <= 512 // values["TILES"] and _fits_core(shape, values, lds_bytes)


def allows_tma(shape: Shape, values: Values) -> bool:
    """Of `matmul_tma`: a consumer has registers for its sums, a gate's group and its up's are two, and leave no
    partials."""
    sums, groups = values["TILES"] * values["TOKENS"] // 2, values["BLOCK"] // 128
    if shape["op"] != "linear" and (values["SPLITS"] > 1 or values["TILES"] * groups % 2):
        return False
    return values["TOKENS"] <= shape["tokens"] and 32 < sums <= (128 if groups == 2 else 64)


def allows_quant(shape: Shape, values: Values) -> bool:
    """Of `matmul_wgmma_quant`."""
    threads = values["MIN_BLOCKS"] * values["BLOCK"]
    lds_bytes = quant_lds_bytes(shape["format"], shape["tokens"], values)
    return 256 <= threads <= 512 and _fits_core(shape, values, lds_bytes)


def allows_few(shape: Shape, values: Values) -> bool:
    """Of `matmul_mma_quant`: a thread has registers for the sums and the codes of its tiles, and much is under way."""
    waves = values["BLOCK"] // 32
    if values["X_PLACES"] != min(waves, 16) and (values["X_PLACES"] < 16 or values["MIN_BLOCKS"] > 1):
        return False
    threads = values["MIN_BLOCKS"] * values["BLOCK"]
    lds_bytes = values["MIN_BLOCKS"] * (few_lds_bytes(shape["format"], values) + 1024)
    return 256 <= threads <= (640 if values["TILES"] == 1 else 512) and 60 << 10 <= lds_bytes <= 228 << 10


def allows_experts(shape: Shape, values: Values) -> bool:
    """Of `expert_mma_quant`: the same; all of a row of x, or 8 lines of it, have room. For rounds it is all."""
    threads, lines = values["MIN_BLOCKS"] * values["BLOCK"], 4 if shape["inner"] <= 1024 else 8
    if values["X_PLACES"] != lines or (values["ROUNDS"] > 1 and shape["inner"] > 2048):
        return False
    lds_bytes = values["MIN_BLOCKS"] * (few_lds_bytes(shape["format"], values) + 2048)
    return 256 <= threads <= (512 if values["TILES"] == 1 else 384) and 60 << 10 <= lds_bytes <= 228 << 10


def allows_many(shape: Shape, values: Values) -> bool:
    """There is room for enough stages, and each consumer has registers for its sums, weights and what it makes them of.

    Of registers a group of 128 threads that copies keeps 24.
    """
    threads = values["BLOCK"] + 128
    at_launch = 65_536 // (values["MIN_BLOCKS"] * threads) // 8 * 8
    registers = min((at_launch * threads - 24 * 128) // values["BLOCK"], 240)
    if values["TILES"] * values["TOKENS"] // 2 + 72 > registers or values["BLOCK"] * values["MIN_BLOCKS"] < 256:
        return False
    is_near = values["TOKENS"] <= shape["tokens"] <= 2 * values["TOKENS"]  # more blocks make weights again
    lds = many_lds(shape["format"], values)
    return is_near and lds["X_STAGES"] * lds["X_QUARTERS"] >= 3


def allows_attention(shape: Shape, values: Values) -> bool:
    """Of `attention_wgmma`: the block has room in LDS, and a thread in its registers for sums of a row and weights."""
    dim, keys, groups = shape["dim"], values["KEYS"], values["BLOCK"] // 128 - 1
    registers = dim // 2 + keys // 2 + keys // 4
    return attention_lds_bytes(dim, values) <= 227 << 10 and registers <= (200 if groups == 2 else 132)


def allows_decode(shape: Shape, values: Values) -> bool:
    """Of `attention_decode`: the block has room in LDS, and a thread in its registers."""
    dim, packed, threads, positions = shape["dim"], shape["packed"], values["THREADS"], values["POSITIONS"]
    waves = threads // 32
    # each wave's values and weights, queries, the latest key and value, squares of all heads, the parts' shares
    lds_bytes = packed * (waves * (4 * dim + 8 + 32 * positions) + 3 * dim + 16 + 4 * 128) + 10 * dim
    return lds_bytes <= FIXED_LDS_BYTES and 256 <= threads * values["MIN_BLOCKS"] <= 1024 and positions * dim <= 256


def prefill_slices(dim: int) -> int:
    """Waves of `attention_prefill` that share the numbers of a head: a wave has registers to sum up 128 of them."""
    return next(slices for slices in (1, 2, 4) if dim <= 128 * slices)


def prefill_lds_bytes(dim: int, values: Values) -> int:
    """What a block of `attention_prefill` has of LDS at most, whatever matrix cores there are: a tile of keys, one of
    values, queries, and scores where waves share them."""
    queries, keys, waves, slices = values["QUERIES"], values["KEYS"], values["WAVES"], prefill_slices(dim)
    width, dims = (-(-dim // unit) * unit for unit in (32 * slices, 16 * slices))
    halves = (keys + waves // slices * queries) * (width + 8) + max(keys * (dims + 8), dims * (keys + 8))
    return 2 * halves + (4 * waves * queries * keys if slices > 1 else 0)


def allows_prefill(shape: Shape, values: Values) -> bool:
    """Of `attention_prefill`: more than eight waves of a multiprocessor would have too few registers."""
    is_small = prefill_lds_bytes(shape["dim"], values) <= _MAX_LDS_BYTES
    return is_small and values["KEYS"] * shape["dim"] <= 8192 and values["WAVES"] * values["MIN_BLOCKS"] <= 8
