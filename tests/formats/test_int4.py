"""GPTQ, AWQ and compressed-tensors matrices against their definition, packed here code by code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from table_rows import row

from forge.errors import ForgeError, FormatError, ParameterError, UnsupportedError
from forge.formats import int4
from forge.formats.ggml import GGMLType, dequantize, row_bytes
from forge.formats.int4 import Int4, Stored
from forge.ops.quant import split

Arrays = dict[str, np.ndarray]
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # of a word's nibbles, the lowest first


def words(codes: np.ndarray, axis: int, order: list[int] | None = None) -> np.ndarray:
    """Eight codes along an axis as one int32, a nibble each: as the packages' loops over nibbles do it."""
    moved = np.moveaxis(codes.astype(np.int64), axis, -1)
    moved = moved.reshape(*moved.shape[:-1], -1, 8)
    packed = sum(moved[..., column] << 4 * place for place, column in enumerate(order or range(8)))
    return np.moveaxis(packed, -1, axis).astype(np.uint32).view(np.int32)


def drawn(rows: int, cols: int, group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, K), scales (N, K / G), some zero, negative or subnormal, and zeros."""
    rng = np.random.default_rng(seed)
    scales = rng.normal(0, 0.02, (rows, cols // group)).astype(np.float16)
    scales.flat[::7], scales.flat[3::11] = 1e-7, 0
    return rng.integers(0, 16, (rows, cols)), scales, rng.integers(0, 16, scales.shape)


def gptq_arrays(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, more: int = 1) -> Arrays:
    groups = np.arange(codes.shape[1]) * scales.shape[1] // codes.shape[1]
    arrays = {"qweight": words(codes.T, 0), "qzeros": words(zeros.T - more & 15, 1)}
    return arrays | {"scales": scales.T.copy(), "g_idx": groups.astype(np.int32)}


def awq_arrays(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Arrays:
    arrays = {"qweight": words(codes.T, 1, AWQ_COLUMNS), "qzeros": words(zeros.T, 1, AWQ_COLUMNS)}
    return arrays | {"scales": scales.T.copy()}


def compressed_arrays(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Arrays:
    return {
        "weight_packed": words(codes, 1),
        "weight_scale": scales,
        "weight_zero_point": words(zeros, 0),
    }


with_zeros = partial(int4.compressed, has_zeros=True)


def stored(arrays: dict[str, Any]) -> dict[str, Stored]:
    """Arrays as a file holds them. One that is a pair has a dtype that NumPy lacks."""
    found = {}
    for name, given in arrays.items():
        dtype, array = given if isinstance(given, tuple) else ("", given)
        data = array.tobytes()

        def read(start: int, out: np.ndarray, data: bytes = data) -> None:
            assert start >= 0
            assert start + out.nbytes <= len(data)
            assert out.flags.c_contiguous
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)[start : start + out.nbytes]

        names = {"int32": "I32", "float16": "F16", "float32": "F32", "int64": "I64", "uint8": "U8"}
        found[name] = Stored(name, dtype or names[array.dtype.name], array.shape, read)
    return found


LAYOUTS: dict[str, Callable[..., tuple[Arrays, Callable[..., Int4]]]] = {
    "gptq": lambda *drawn: (gptq_arrays(*drawn), lambda *args: int4.gptq(*args, is_v2=False)),
    "gptq_v2": lambda *drawn: (gptq_arrays(*drawn, more=0), lambda *args: int4.gptq(*args, is_v2=True)),
    "awq": lambda *drawn: (awq_arrays(*drawn), int4.awq),
    "compressed": lambda *drawn: (compressed_arrays(*drawn), with_zeros),
}


def expected(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, more: int = 0) -> np.ndarray:
    """scale * (code - zero) in float64."""
    each = codes.shape[1] // scales.shape[1]
    of_weights = [np.repeat(part, each, axis=1) for part in (scales.astype(np.float64), zeros + more)]
    return np.asarray(of_weights[0] * (codes - of_weights[1]))


def weights_of(matrix: Int4, start: int = 0, stop: int | None = None) -> np.ndarray:
    rows = range(matrix.shape[0])[start:stop]
    out = np.full((len(rows), row_bytes(matrix.type, matrix.shape[1])), 0xEE, np.uint8)
    matrix.read(rows.start, out)
    return dequantize(out, matrix.type)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "group", "type"), [((40, 384), 128, "Q4_G128"), ((16, 96), 32, "Q4_G32")])
def test_weights_are_those_of_the_definition(layout: str, shape: tuple[int, int], group: int, type: str) -> None:
    """To the bit. Zeros of GPTQ's first version are 1 to 16."""
    codes, scales, zeros = drawn(*shape, group)
    arrays, read = LAYOUTS[layout](codes, scales, zeros + (layout == "gptq"))
    matrix = read("m", stored(arrays), group)
    assert (matrix.type.name, matrix.shape) == (type, shape)
    wanted = expected(codes, scales, zeros, int(layout == "gptq"))
    np.testing.assert_array_equal(weights_of(matrix), wanted)
    for start, stop in ((0, 1), (3, 12), (shape[0] - 1, None), (8, 16)):  # few of them, and not from whole words
        np.testing.assert_array_equal(weights_of(matrix, start, stop), wanted[start:stop])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_columns_at_a_time_and_few_rows_alone(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "_STEP_WEIGHTS", 1)
    codes, scales, zeros = drawn(48, 512, 256, seed=1)
    arrays, read = LAYOUTS[layout](codes, scales, np.maximum(zeros, 1))
    wanted = expected(codes, scales, np.maximum(zeros, 1))
    matrix = read("m", stored(arrays), 256)
    for least in (1, 1 << 12):
        monkeypatch.setattr(int4, "_RUN_BYTES", least)
        for start, stop in ((0, None), (3, 12), (40, 48), (47, None)):
            np.testing.assert_array_equal(weights_of(matrix, start, stop), wanted[start:stop])


def test_by_hand() -> None:
    """A word each: nibbles are read off its digits, from the right."""
    word, zeros, half = 0x76543210, 0x33333333, np.float16(0.5)
    gptq = {
        "qweight": np.full((4, 8), word, np.int32),
        "qzeros": np.full((1, 1), zeros, np.int32),
        "scales": np.full((1, 8), half),
    }
    row_of_gptq = [(code - 4) / 2 for code in range(8)]
    found = int4.gptq("m", stored(gptq), 32, is_v2=False)
    np.testing.assert_array_equal(weights_of(found), 8 * [4 * row_of_gptq])
    awq = gptq | {"qweight": np.full((32, 1), word, np.int32)}
    # nibbles 0 to 3 are the even columns, 4 to 7 the odd ones
    np.testing.assert_array_equal(
        weights_of(int4.awq("m", stored(awq), 32))[:, 0], [(code - 3) / 2 for code in (0, 4, 1, 5, 2, 6, 3, 7)]
    )
    packed = {"weight_packed": np.full((1, 4), word, np.int32), "weight_scale": np.full((1, 1), half)}
    np.testing.assert_array_equal(
        weights_of(int4.compressed("m", stored(packed), 32)), [4 * [(code - 8) / 2 for code in range(8)]]
    )


def test_a_block_is_a_scale_a_zero_and_codes_whose_second_half_is_above_the_first() -> None:
    type, blocks = int4.pack(np.arange(32, dtype=np.uint8)[None] % 16, np.ones((1, 1)), np.full((1, 1), 9, np.uint8))
    assert type is GGMLType.Q4_G32
    assert blocks.tolist() == [[0x00, 0x3C, 9, 0, *(17 * code for code in range(16))]]
    assert dequantize(blocks, type).tolist() == [[code % 16 - 9 for code in range(32)]]
    quants, _, _, deltas = split(type, blocks)
    assert (quants is not None, deltas is not None) == (True, True)


@pytest.mark.parametrize(("cols", "group", "type"), [(96, 32, "Q4_G32"), (192, 64, "Q4_G32"), (768, 384, "Q4_G128")])
def test_codes_are_packed(cols: int, group: int, type: str) -> None:
    """Of groups that are several blocks, too; with zeros and without."""
    codes, scales, zeros = drawn(5, cols, group, seed=2)
    given = codes.astype(np.uint8), scales.astype(np.float32)
    found, blocks = int4.pack(*given, zeros.astype(np.uint8))
    assert found.name == type
    np.testing.assert_array_equal(dequantize(blocks, found), expected(codes, scales, zeros))
    np.testing.assert_array_equal(dequantize(int4.pack(*given)[1], found), expected(codes, scales, 0 * zeros + 8))
    assert blocks.nbytes * 8 / codes.size == (4.25 if group % 128 == 0 else 5)


def test_what_cannot_be_packed_is_refused() -> None:
    codes, scale = np.zeros((1, 64), np.uint8), np.ones((1, 1))
    with pytest.raises(UnsupportedError, match="groups of 16 weights have no kernels: multiples of 32 have"):
        int4.pack(codes, np.ones((1, 4)))
    with pytest.raises(ParameterError, match="scales: 3 of a row of 64 weights"):
        int4.pack(codes, np.ones((1, 3)))
    with pytest.raises(ParameterError, match="scales: beyond float16"):
        int4.pack(codes, scale * 1e5)


def test_scales_of_other_types_are_rounded_to_float16() -> None:
    codes, _, zeros = drawn(8, 64, 32, seed=3)
    numbers = np.random.default_rng(3).normal(0, 0.01, (8, 2)).astype(np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    of_bits = (bits.astype(np.uint32) << 16).view(np.float32)
    for name, scales, given in (("F32", numbers, numbers), ("BF16", of_bits, ("BF16", bits))):
        with row(name):
            arrays: dict[str, Any] = {**compressed_arrays(codes, numbers, zeros), "weight_scale": given}
            found = weights_of(with_zeros("m", stored(arrays), 32))
            np.testing.assert_array_equal(found, expected(codes, scales.astype(np.float16), zeros))
    np.testing.assert_array_equal(of_bits.astype(np.float16), of_bits)  # of usual size nothing is lost


def of(layout: str, **changes: Any) -> Callable[[], object]:
    """A matrix (16, 256) in groups of 128 with other arrays, of which None is left out, or another group."""

    def make() -> object:
        group = changes.pop("group", 128)
        arrays, read = LAYOUTS[layout](*(drawn(16, 256, 128)[:2]), np.full((16, 2), 7))
        arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
        return weights_of(read("file: 'm'", stored(arrays), group))

    return make


def int32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


HALVES = np.ones((2, 16), np.float16)
BAD: dict[str, tuple[Callable[[], object], type[ForgeError], str]] = {
    "no qweight": (of("gptq", qweight=None), FormatError, "qweight is missing"),
    "no qzeros": (of("gptq", qzeros=None), FormatError, "qzeros is missing"),
    "no scales": (of("awq", scales=None), FormatError, "scales is missing"),
    "no scales at all": (of("compressed", weight_scale=None), FormatError, "weight_scale is missing"),
    "a vector": (of("gptq", qweight=int32(512)), FormatError, r"qweight is I32 \(512,\), not two dimensions of I32"),
    "three dimensions": (of("awq", qzeros=int32(2, 2, 1)), FormatError, "qzeros is I32"),
    "no rows": (of("awq", qweight=int32(0, 2)), FormatError, r"qweight is I32 \(0, 2\)"),
    "no columns": (of("gptq", qweight=int32(32, 0)), FormatError, r"qweight is I32 \(32, 0\)"),
    "codes in 64 bits": (of("gptq", qweight=np.zeros((32, 16), np.int64)), FormatError, "qweight is I64"),
    "codes in bytes": (
        of("compressed", weight_packed=np.zeros((16, 32), np.uint8)),
        FormatError,
        "weight_packed is U8",
    ),
    "scales that are integers": (of("awq", scales=int32(2, 16)), FormatError, "scales is I32 .* F16 or BF16 or F32"),
    "zeros that are floats": (of("awq", qzeros=HALVES), FormatError, "qzeros is F16"),
    "zeros of fewer groups": (of("gptq", qzeros=int32(1, 2)), FormatError, r"qzeros has shape \(1, 2\), not \(2, 2\)"),
    "zeros of more rows": (of("awq", qzeros=int32(2, 3)), FormatError, r"qzeros has shape \(2, 3\), not \(2, 2\)"),
    "zeros along the other side": (of("compressed", weight_zero_point=int32(16, 1)), FormatError, r"not \(2, 2\)"),
    "scales transposed": (of("gptq", scales=HALVES.T.copy()), FormatError, r"\(16, 2\), not \(2, 16\)"),
    "scales of fewer groups": (of("compressed", weight_scale=HALVES.T[:, :1].copy()), FormatError, r"\(16, 1\), not"),
    "half of the codes": (of("gptq", qweight=int32(16, 16)), FormatError, r"qzeros has shape \(2, 2\), not \(1, 2\)"),
    "codes of another width": (
        of("awq", qweight=int32(256, 3)),
        FormatError,
        r"qzeros has shape \(2, 2\), not \(2, 3\)",
    ),
    "rows that fill no word of zeros": (of("gptq", qweight=int32(32, 12)), FormatError, "12 rows, no multiple of 8"),
    "no whole groups": (of("gptq", group=96), FormatError, "rows of 256 weights, which are no groups of 96"),
    "a group wider than a row": (of("awq", group=512), FormatError, "no groups of 512"),
    "groups of none": (of("awq", group=0), FormatError, "no groups of 0"),
    "groups of -2": (of("awq", group=-2), FormatError, "no groups of -2"),
    "groups of 2^63": (of("awq", group=2**63), FormatError, "no groups of 9223372036854775808"),
    "groups of 16": (of("gptq", group=16), UnsupportedError, "groups of 16 weights have no kernels"),
    "one group, arrays of two": (of("gptq", group=-1), FormatError, r"qzeros has shape \(2, 2\), not \(1, 2\)"),
    "a group that is not there": (
        of("gptq", g_idx=int32(256) + 2),
        FormatError,
        "groups that are not there: there are 2",
    ),
    "a group below zero": (of("gptq", g_idx=int32(256) - 1), FormatError, "groups that are not there"),
    "groups of fewer columns": (of("gptq", g_idx=int32(128)), FormatError, r"g_idx has shape \(128,\), not \(256,\)"),
    "groups in 64 bits": (of("gptq", g_idx=np.zeros(256, np.int64)), FormatError, "g_idx is I64, not I32"),
    "columns in another order": (
        of("gptq", g_idx=np.arange(256, dtype=np.int32) % 2),
        UnsupportedError,
        r"columns are not in the order of their groups \(desc_act\).*: take a checkpoint with desc_act false",
    ),
    "the same of compressed-tensors": (of("compressed", weight_g_idx=int32(256)), UnsupportedError, "desc_act"),
    "scales beyond float16": (of("awq", scales=np.full((2, 16), 1e6, np.float32)), FormatError, "beyond float16"),
}


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    assert len(BAD) >= 30
    for name, (make, kind, message) in BAD.items():
        with row(name):
            with pytest.raises(ForgeError, match=message) as caught:
                make()
            assert type(caught.value) is kind
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith("file: 'm': ")


def test_one_group_of_all_columns() -> None:
    codes, scales, zeros = drawn(8, 256, 256, seed=4)
    matrix = int4.awq("m", stored(awq_arrays(codes, scales, zeros)), -1)
    assert (matrix.type, matrix.group) == (GGMLType.Q4_G128, 256)
    np.testing.assert_array_equal(weights_of(matrix), expected(codes, scales, zeros))
