"""Quantization, bit for bit against the `gguf` package."""

import gguf
import numpy as np
import pytest

from forge.errors import ParameterError, UnsupportedError
from forge.formats import quantize as quantizing
from forge.formats.ggml import GGMLType, dequantize
from forge.formats.quantize import QUANTIZERS, quantize

NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4"
BY_GGUF = [GGMLType[name] for name in NAMES.split()]
BLOCKS_OF_32 = [type for type in BY_GGUF if type.block_size == 32]


def by_gguf(rows: np.ndarray, type: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        blocks = gguf.quantize(rows, gguf.GGMLQuantizationType(type.value))
    return np.asarray(blocks).reshape(len(rows), -1).view(np.uint8)


def drawn(kind: str, rows: int, cols: int) -> np.ndarray:
    """Weights as matrices have them, few different ones (ties, in the extremes too), or of all sizes."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind == "ties":
        x = np.round(4 * x) / 8
    elif kind == "wide":
        x *= np.exp2(rng.integers(-60, 15, (rows, 1))).astype(np.float32)
    elif kind == "sparse":
        x *= rng.random((rows, cols)) < 0.02
    return x


def assert_same_blocks(rows: np.ndarray, type: GGMLType) -> None:
    np.testing.assert_array_equal(quantize(rows, type), by_gguf(rows, type))


@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "sparse"])
@pytest.mark.parametrize("type", BY_GGUF, ids=lambda t: t.name)
def test_blocks_are_those_of_the_gguf_package(type: GGMLType, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than one chunk, the last of them short, with a border within a row."""
    monkeypatch.setattr(quantizing, "_CHUNK_GROUPS", 1000)
    rows = drawn(kind, 33, 32 * 31)
    assert_same_blocks(rows, type)


@pytest.mark.parametrize("type", BLOCKS_OF_32, ids=lambda t: t.name)
def test_blocks_at_the_edges_are_those_of_the_gguf_package(type: GGMLType) -> None:
    """Zeros of both signs, equal weights, one alone, extremes of both signs in both orders, and scales that float16
    rounds to a subnormal number or to zero."""
    eye = np.eye(32, dtype=np.float32)
    both = eye - np.roll(eye, 5, axis=1)
    ones = np.ones((1, 32), np.float32)
    parts = [0 * ones, -0.0 * ones, ones, -3 * ones, eye, -eye, both, 1e-5 * both, 3e-8 * eye, 2e-30 * both]
    assert_same_blocks(np.concatenate(parts).astype(np.float32), type)


def test_ties_are_rounded_as_gguf_does() -> None:
    """Multiples of half a step, and the numbers beside them."""
    for type, steps in ((GGMLType.Q8_0, 127), (GGMLType.Q4_0, -8), (GGMLType.Q5_0, -16), (GGMLType.Q4_1, 15)):
        halves = np.resize(np.arange(1, 31, dtype=np.float32) / 2, (3, 31))
        halves[1] = np.nextafter(halves[1], np.float32(0))
        halves[2] = np.nextafter(halves[2], np.float32(99))
        assert_same_blocks(np.hstack([halves, np.full((3, 1), steps, np.float32)]), type)


@pytest.mark.parametrize(("type", "most"), [(GGMLType.Q4_1, 15), (GGMLType.Q5_1, 31)])
def test_numbers_beside_half_steps_are_rounded_as_gguf_does(type: GGMLType, most: int) -> None:
    """The number before 0.5 becomes 1: its sum with 0.5 rounds to that."""
    halves = np.resize(np.arange(1, 2 * most, dtype=np.float32) / 2, (3, 32))
    halves[1:] = np.nextafter(halves[1:], np.array([[0], [99]], np.float32))
    halves[:, -2:] = 0, most
    assert_same_blocks(halves, type)
    found = quantize(np.float32([[0.49999997] + [0] * 30 + [most]]), type)
    assert found[0, -16] & 15 == 1


def test_scales_of_mxfp4_next_to_powers_of_two() -> None:
    """A float32 logarithm rounds up to the next integer just below a power of 2, the farther the larger it is."""
    powers = np.exp2(np.arange(-123, 127, dtype=np.float32))
    below = np.arange(60, dtype=np.uint32)
    most = (powers.view(np.uint32)[:, None] - below).view(np.float32).reshape(-1, 1)
    rows = most * np.linspace(-1, 1, 32, dtype=np.float32)
    assert_same_blocks(rows, GGMLType.MXFP4)


def test_an_mxfp4_block_by_hand() -> None:
    """The largest weight, 5, is in [4, 8), so that the scale is 1: codes are E2M1, ties go to the smaller number."""
    rows = np.zeros((1, 32), np.float32)
    rows[0, :8] = 5, -5, 0.25, -0.25, 0.26, -2.5, 2.6, -6
    block = quantize(rows, GGMLType.MXFP4)
    assert block[0, 0] == 127
    np.testing.assert_array_equal(block[0, 1:9] & 15, [6, 14, 0, 0, 1, 12, 5, 15])
    np.testing.assert_array_equal(dequantize(block, GGMLType.MXFP4)[0, :8], [4, -4, 0, 0, 0.5, -2, 3, -6])


@pytest.mark.parametrize("type", BLOCKS_OF_32, ids=lambda t: t.name)
def test_weights_whose_scale_has_no_inverse_are_zeros(type: GGMLType) -> None:
    """`gguf` multiplies by infinity there."""
    rows = np.full((1, 32), 1e-40, np.float32)
    rows[0, 1] = -1e-40
    assert np.abs(dequantize(quantize(rows, type), type)).max() <= 1e-38


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", BLOCKS_OF_32, ids=lambda t: t.name)
def test_weights_that_are_not_finite_are_refused(type: GGMLType, value: float) -> None:
    rows = np.ones((2, 64), np.float32)
    rows[1, 40] = value
    with pytest.raises(UnsupportedError, match=f"^weights are not finite, or too large for {type.name}$"):
        quantize(rows, type)


def test_weights_beyond_a_float16_scale_are_refused() -> None:
    rows = np.full((1, 32), 65504 * 8, np.float32)
    quantize(rows, GGMLType.Q4_0)
    with pytest.raises(UnsupportedError, match="too large for Q4_0"):
        quantize(rows * 2, GGMLType.Q4_0)
    with pytest.raises(UnsupportedError, match="too large for F16"):
        quantize(rows, GGMLType.F16)
    quantize(np.full((1, 32), np.inf, np.float32), GGMLType.F16)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"cols: 48 is no multiple of Q8_0's block of 32"):
        quantize(np.zeros((1, 48), np.float32), GGMLType.Q8_0)
    with pytest.raises(ParameterError, match=r"expected float32 \(rows, cols\), not float64 \(1, 32\)"):
        quantize(np.zeros((1, 32)), GGMLType.Q8_0)
    with pytest.raises(ParameterError, match=r"out: expected C-contiguous uint8 \(1, 34\), not uint8 \(1, 33\)"):
        quantize(np.zeros((1, 32), np.float32), GGMLType.Q8_0, np.empty((1, 33), np.uint8))
    with pytest.raises(UnsupportedError, match="nothing writes blocks of type IQ4_NL: use one of F32, F16, "):
        quantize(np.zeros((1, 32), np.float32), GGMLType.IQ4_NL)
    assert list(QUANTIZERS)[:3] == [GGMLType.F32, GGMLType.F16, GGMLType.BF16]


def test_rows_that_are_not_contiguous_and_a_given_output() -> None:
    rows = drawn("normal", 64, 64).T[:, ::2]
    out = np.full((64, 34), 7, np.uint8)
    assert quantize(rows, GGMLType.Q8_0, out) is out
    np.testing.assert_array_equal(out, by_gguf(np.ascontiguousarray(rows), GGMLType.Q8_0))


@pytest.mark.parametrize("type", BY_GGUF, ids=lambda t: t.name)
def test_the_weights_stay_as_they_are(type: GGMLType) -> None:
    """A single block too, which lies as its transposed copy would."""
    rows = drawn("normal", 1, 32)
    kept = rows.copy()
    quantize(rows, type)
    np.testing.assert_array_equal(rows, kept)
