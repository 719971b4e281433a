"""Dequantization, bit for bit against the `gguf` package."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from table_rows import row

from forge.errors import ParameterError, UnsupportedError
from forge.formats import ggml
from forge.formats.codebooks import codebook
from forge.formats.ggml import GGMLType, dequantize, nbytes, row_bytes

OWN = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
OWN += " IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M"
WITHOUT_REFERENCE = "Q1_0 Q2_0"  # the `gguf` package cannot read them
THROUGH_GGUF = "TQ1_0 TQ2_0 NVFP4"
NONE = "Q8_1 Q8_K I8 I16 I32 I64 F64"
# The float16 fields of a block: where a random byte pattern is a NaN or infinite once in 32 times.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "IQ2_XXS": [0],
    "IQ3_S": [0],
    "IQ1_S": [0],
}
EDGE_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x3C00], np.uint16)


def types(names: str) -> list[GGMLType]:
    return [GGMLType[name] for name in names.split()]


def reference(blocks: np.ndarray, type: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType(type.value)))


def assert_same_bits(blocks: np.ndarray, type: GGMLType) -> None:
    ours, expected = dequantize(blocks, type), reference(blocks, type)
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def random_blocks(type: GGMLType, rows: int, blocks_per_row: int, seed: int = 0) -> np.ndarray:
    shape = rows, blocks_per_row * type.type_size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_type_table_is_that_of_the_gguf_package() -> None:
    theirs = {t.name: (t.value, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {t.name: (t.value, t.block_size, t.type_size) for t in GGMLType}
    assert {name: ours[name] for name in theirs} == theirs  # an older package may know fewer types


@pytest.mark.parametrize("type", types(f"{OWN} {THROUGH_GGUF}"), ids=lambda t: t.name)
def test_random_blocks_give_the_same_bits(type: GGMLType) -> None:
    if type.name not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf package has no {type.name}")
    assert_same_bits(random_blocks(type, 37, 3), type)


@pytest.mark.parametrize("type", types(OWN), ids=lambda t: t.name)
def test_more_than_one_chunk_gives_the_same_bits(type: GGMLType) -> None:
    """The last chunk is a short one, and the border lies inside a row."""
    per_row = 8192 // type.block_size - 1
    assert 11 * per_row * type.block_size > ggml.CHUNK_WEIGHTS
    assert_same_bits(random_blocks(type, 11, per_row, seed=1), type)


@pytest.mark.parametrize("type", types(OWN), ids=lambda t: t.name)
def test_constant_bytes_give_the_same_bits(type: GGMLType) -> None:
    for byte in (0x00, 0xFF, 0x80, 0x7F, 0x01, 0xF0, 0x0F):
        with row(hex(byte)):
            assert_same_bits(np.full((2, 2 * type.type_size), byte, np.uint8), type)


@pytest.mark.parametrize("name", HALVES)
def test_edge_scales_give_the_same_bits(name: str) -> None:
    """Zero, negative zero, subnormal, largest, infinite, NaN; every pair of them where there are two fields."""
    type = GGMLType[name]
    first, second = (a.ravel() for a in np.meshgrid(EDGE_HALVES, EDGE_HALVES))
    blocks = random_blocks(type, len(first), 1, seed=2)
    for start, values in zip(HALVES[name], (first, second), strict=False):
        blocks[:, start : start + 2] = values[:, None].view(np.uint8)
    assert_same_bits(blocks, type)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks_are_those_of_the_gguf_package(name: str) -> None:
    """In the kernels' source, which Python reads. Those of IQ1 are 8 times as large."""
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    np.testing.assert_array_equal(codebook(name), theirs.grid[0, 0] * (8 if name.startswith("IQ1") else 1))


@pytest.mark.parametrize("type", types(WITHOUT_REFERENCE), ids=lambda t: t.name)
def test_types_that_the_gguf_package_cannot_read(type: GGMLType) -> None:
    """Weight by weight, as ggml's dequantize_row_q1_0 and dequantize_row_q2_0 define them."""
    blocks = random_blocks(type, 3, 2)
    scales = np.array([0, 0x8000, 1, 0x7BFF, 0xFC00, 0x3C00], np.uint16).view(np.float16)
    blocks.reshape(6, -1)[:, :2] = scales.view(np.uint8).reshape(6, 2)
    per_byte, expected = type.block_size // 16, []
    for block in blocks.reshape(6, -1):
        scale = float(block[:2].view(np.float16)[0])
        for i in range(type.block_size):
            code = int(block[2 + i // per_byte]) >> 8 // per_byte * (i % per_byte)
            expected.append(scale * (2 * (code & 1) - 1 if type.name == "Q1_0" else (code & 3) - 1))
    np.testing.assert_array_equal(dequantize(blocks, type).ravel(), np.array(expected, np.float32))


def test_every_exponent_and_code_of_mxfp4_gives_the_same_bits() -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    assert_same_bits(np.hstack([np.arange(256, dtype=np.uint8)[:, None], codes]), GGMLType.MXFP4)


def test_every_float16_gives_the_same_bits_as_numpy() -> None:
    """Infinities and NaNs in a row, and the others without them."""
    every = np.arange(1 << 16, dtype=np.uint16)
    for halves in (every, every[np.isfinite(every.view(np.float16))]):
        weights = dequantize(halves.view(np.uint8)[None], GGMLType.F16)
        np.testing.assert_array_equal(weights[0].view(np.uint32), halves.view("<f2").astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("type", types("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 F16 BF16"), ids=lambda t: t.name)
def test_quantized_weights_come_back_near_themselves(type: GGMLType) -> None:
    weights = np.random.default_rng(3).standard_normal((24, 192)).astype(np.float32) * 0.02
    blocks = np.asarray(gguf.quantize(weights, gguf.GGMLQuantizationType(type.value))).view(np.uint8)
    assert_same_bits(blocks, type)
    tolerance = {"Q4_0": 0.008, "Q4_1": 0.005, "Q5_0": 0.004, "Q5_1": 0.0025}.get(type.name, 0.0005)
    assert np.abs(dequantize(blocks, type) - weights).max() < tolerance


def test_a_q4_1_block_computed_by_hand() -> None:
    """Low nibbles are weights 0 to 15, high ones 16 to 31: 0.5 * code - 1."""
    block = np.array([0.5, -1.0], np.float16).view(np.uint8)
    codes = np.arange(16, dtype=np.uint8) | (15 - np.arange(16, dtype=np.uint8)) << 4
    weights = dequantize(np.concatenate([block, codes])[None], GGMLType.Q4_1)
    np.testing.assert_array_equal(weights[0], [*(0.5 * i - 1 for i in range(16)), *(6.5 - 0.5 * i for i in range(16))])


@pytest.mark.parametrize("type", types("F32 BF16 Q4_1 Q6_K MXFP4"), ids=lambda t: t.name)
def test_rows_in_threads_into_one_array(type: GGMLType) -> None:
    blocks = random_blocks(type, 64, 4, seed=4)
    out = np.full((64, 4 * type.block_size), 7, np.float32)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: dequantize(blocks[i : i + 8], type, out[i : i + 8]), range(0, 64, 8))
        assert all(np.shares_memory(part, out) for part in parts)
    np.testing.assert_array_equal(out.view(np.uint32), reference(blocks, type).view(np.uint32))


def test_rows_apart_from_each_other_and_unaligned() -> None:
    for type in types("F32 Q4_1 Q6_K IQ4_XS"):
        size = 2 * type.type_size
        buffer = np.random.default_rng(5).integers(0, 256, 1 + 6 * (size + 3), dtype=np.uint8)
        blocks = buffer[1:].reshape(6, size + 3)[:, :size]
        expected = reference(blocks.copy(), type)
        np.testing.assert_array_equal(dequantize(blocks, type).view(np.uint32), expected.view(np.uint32))


def test_no_rows_give_no_weights() -> None:
    assert dequantize(np.empty((0, 40), np.uint8), GGMLType.Q4_1).shape == (0, 64)


@pytest.mark.parametrize("type", types(NONE), ids=lambda t: t.name)
def test_a_type_without_dequantizer_is_named(type: GGMLType) -> None:
    with pytest.raises(UnsupportedError, match=rf"\b{type.name}\b"):
        dequantize(np.zeros((1, type.type_size), np.uint8), type)


@pytest.mark.parametrize(
    ("blocks", "out", "word"),
    [
        (np.zeros((1, 19), np.uint8), None, "blocks"),
        (np.zeros((1, 20), np.int8), None, "blocks"),
        (np.zeros((2, 20), np.uint8), np.zeros((2, 31), np.float32), "out"),
        (np.zeros((2, 20), np.uint8), np.zeros((2, 32), np.float64), "out"),
        (np.zeros((2, 20), np.uint8), np.zeros((32, 2), np.float32).T, "out"),
    ],
)
def test_wrong_arguments_are_named(blocks: np.ndarray, out: np.ndarray | None, word: str) -> None:
    with pytest.raises(ParameterError, match=word):
        dequantize(blocks, GGMLType.Q4_1, out)


def test_sizes() -> None:
    assert row_bytes(GGMLType.Q4_1, 576) == 360
    assert nbytes(GGMLType.Q6_K, (3, 2, 512)) == 6 * 420
    assert nbytes(GGMLType.F32, (5,)) == 20
    with pytest.raises(ParameterError, match="Q4_1"):
        row_bytes(GGMLType.Q4_1, 33)
