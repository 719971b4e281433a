"""Quantization to K types: against llama.cpp's own blocks, and against the rule weight by weight."""

from pathlib import Path

import numpy as np
import pytest

from forge.errors import UnsupportedError
from forge.formats import quantize as quantizing
from forge.formats.ggml import GGMLType, dequantize
from forge.formats.quantize import quantize
from forge.formats.quantize_k import CANDIDATES

DATA = Path(__file__).parents[1] / "data" / "quantize"
TYPES = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]
f32 = np.float32


def weighted_error(rows: np.ndarray, blocks: np.ndarray, type: GGMLType) -> float:
    """As ggml weighs weights: |x| + rms(x) of their group of 32, or in Q6_K their squares."""
    exact = rows.astype(np.float64).reshape(-1, 32)
    error = (dequantize(blocks, type).reshape(-1, 32) - exact) ** 2
    rms = np.sqrt((exact**2).mean(axis=1, keepdims=True))
    return float(((exact**2 if type is GGMLType.Q6_K else np.abs(exact) + rms) * error).sum())


@pytest.mark.parametrize(("name", "most"), [("q4_k", 1.0), ("q5_k", 0.96), ("q6_k", 0.95)])
def test_the_weighted_error_is_no_larger_than_that_of_llama_cpp(name: str, most: float) -> None:
    type, rows = GGMLType[name.upper()], np.load(DATA / "weights.npy").astype(np.float32)
    theirs, ours = np.load(DATA / f"{name}.npy"), quantize(rows, type)
    for i, kind in enumerate(("normal", "laplacian", "uniform")):
        part = slice(4 * i, 4 * i + 4)
        share = weighted_error(rows[part], ours[part], type) / weighted_error(rows[part], theirs[part], type)
        assert share < most, kind


def total(terms: list[np.float32]) -> np.float32:
    """Their sum in float32, in their order."""
    sum = terms[0]
    for term in terms[1:]:
        sum = f32(sum + term)
    return sum


def distances(places: list[int], factor: int) -> list[int]:
    """From the multiples of `factor` to the nearest multiples of 2**16, in 32nds of these, rounded down."""
    return [((place * factor + 32768) % 65536 - 32768) // 2048 for place in places]


def first_line(t: list[np.float32], w: list[np.float32], bits: int) -> tuple[np.float32, np.float32]:
    """By whole numbers: a code is t * steep - start."""
    places, whole = [int(v) for v in t], [int(v) for v in w]
    at = [place // 256 - 8 for place in places]
    sum_w = f32(sum(whole))
    mean = f32(sum(a * u for a, u in zip(whole, at, strict=True))) / sum_w
    spread = f32(sum(a * u * u for a, u in zip(whole, at, strict=True))) - sum_w * mean * mean
    found = []
    for k, factor in enumerate(CANDIDATES[bits]):
        q = distances(places, factor)
        shift = f32(sum(a * d for a, d in zip(whole, q, strict=True)))
        tilt = f32(sum(a * d * u for a, d, u in zip(whole, q, at, strict=True))) - shift * mean
        error = f32(sum(a * d * d for a, d in zip(whole, q, strict=True))) - shift * shift / sum_w
        error = (error - tilt * tilt * (f32(1) / spread)) * (f32(1) / f32(factor * factor))
        found.append((int(error.view(np.int32)) & -16 | k, factor, shift / sum_w, tilt * (f32(1) / spread)))
    _, factor, shift, tilt = min(found)
    start = (shift + f32(0.5) - tilt * (mean + f32(8.5))) / f32(32)
    return (f32(factor) / f32(16) - tilt * f32(0.5)) / f32(4096), start


def line(x: list[np.float32], bits: int) -> tuple[np.float32, np.float32, np.float32]:
    """Scale, and weighted means of codes and weights, of one group of Q4_K or Q5_K."""
    rms = np.sqrt(total([v * v for v in x]) / f32(32))
    w = [abs(v) * (f32(4) / rms) + f32(4) for v in x]
    low = min(f32(0), *x)
    size = max(x) - low
    t = [(v - low) * (f32(4096) / size) for v in x]
    wt = [a * b for a, b in zip(w, t, strict=True)]
    sum_w, sum_t = total(w), total(wt)
    mean = sum_t / sum_w
    best = (f32(0),) * 5

    def tried(steep: np.float32, start: np.float32) -> tuple[np.float32, ...]:
        codes = [np.clip(np.rint(v * steep - start), f32(0), f32((1 << bits) - 1)) for v in t]
        wl = [a * b for a, b in zip(w, codes, strict=True)]
        sum_l, sum_l2 = total(wl), total([a * b for a, b in zip(wl, codes, strict=True)])
        sum_lt = total([a * b for a, b in zip(wt, codes, strict=True)])
        common = sum_w * sum_lt - sum_l * sum_t
        slope = common / (sum_w * sum_l2 - sum_l * sum_l)
        assert sum_w * sum_l2 - sum_l * sum_l > f32(2**-16) * sum_l * sum_l
        return max(best, (common * slope, slope, sum_l, sum_l2, sum_lt), key=lambda found: found[0])

    best = tried(*first_line(t, w, bits))
    best = tried(f32(1) / best[1], (mean - best[1] * (best[2] / sum_w)) * (f32(1) / best[1]))
    slope = best[1]
    if low == 0 and sum_t > slope * best[2]:
        slope = best[4] / best[3]
    unit = size / f32(4096)
    return slope * unit, best[2] / sum_w, mean * unit + low


def by_rule(row: np.ndarray, bits: int) -> tuple[list[int], list[int], list[int]]:
    """Scales, minima and codes of a block, as whole numbers."""
    groups = [list(part) for part in row.reshape(8, 32)]
    lines = [line(group, bits) for group in groups]

    def sixths(values: list[np.float32]) -> tuple[list[int], list[np.float32]]:
        most = max(values)
        codes = [min(np.rint(value * (f32(63) / most)), f32(63)) if most > 0 else f32(0) for value in values]
        unit = f32(np.float16(most / f32(63)))
        return [int(code) for code in codes], [unit * code for code in codes]

    scales, steps = sixths([scale for scale, _, _ in lines])
    fitted = [max(step * code - mean, f32(0)) for step, (_, code, mean) in zip(steps, lines, strict=True)]
    minima, lows = sixths(fitted)
    codes = [
        int(np.clip(np.rint((v + low) * (f32(1) / step)), 0, (1 << bits) - 1)) if step > 0 else 0
        for group, step, low in zip(groups, steps, lows, strict=True)
        for v in group
    ]
    return scales, minima, codes


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("row", [0, 5, "positive"])
def test_blocks_with_minima_weight_by_weight(bits: int, row: int | str) -> None:
    """Sums in the order of the weights, each step rounded to float32."""
    rows = np.load(DATA / "weights.npy").astype(np.float32)
    x = np.abs(rows[0, :256]) + f32(0.01) if row == "positive" else rows[int(row), :256]
    type = TYPES[bits - 4]
    block = quantize(x[None], type)[0]
    scales, minima, codes = by_rule(x, bits)
    packed = block[4:16].astype(int)
    assert [*(packed[:4] & 63), *(packed[8:] & 15 | packed[:4] >> 6 << 4)] == scales
    assert [*(packed[4:8] & 63), *(packed[8:] >> 4 | packed[4:8] >> 6 << 4)] == minima
    weights = dequantize(block[None], type)[0]
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    for i in range(256):
        assert weights[i] == d * f32(scales[i // 32]) * f32(codes[i]) - dmin * f32(minima[i // 32])


def scale_of(x: list[np.float32]) -> np.float32:
    """The scale of one group of Q6_K."""
    largest = max(x, key=abs)
    t = [v * (f32(-4096) / largest) for v in x]
    squares = [v * v for v in t]
    whole = [int(v * (f32(255) / total(squares))) for v in squares]
    places = [int(v) + 2 for v in t]
    at = [(place + 256) // 512 for place in places]
    inverse = f32(1) / f32(sum(a * u * u for a, u in zip(whole, at, strict=True)))
    lost = max(t) * max(t) * (f32(255 * 2048) / total(squares))
    found = []
    for k, factor in enumerate(CANDIDATES[6]):
        q = distances(places, factor)
        tilt = f32(sum(a * d * u for a, d, u in zip(whole, q, at, strict=True)))
        error = f32(sum(a * d * d for a, d in zip(whole, q, strict=True))) - tilt * tilt * inverse
        if factor > 504:
            error += max(max(t) * f32(factor / 65536) - f32(31.5), f32(0)) * lost
        error *= f32(1) / f32(factor * factor)
        found.append((int(error.view(np.int32)) & -16 | k, factor, tilt))
    _, factor, tilt = min(found)
    steep = (f32(factor) / f32(16) - tilt * inverse * f32(0.25)) / f32(4096)
    codes = [np.clip(np.rint(v * steep), f32(-32), f32(31)) for v in t]
    common = total([a * code * v for a, code, v in zip(squares, codes, t, strict=True)])
    square = total([a * code * code for a, code in zip(squares, codes, strict=True)])
    return common * (f32(1) / square) * (largest / f32(-4096))


def test_a_q6_block_weight_by_weight() -> None:
    x = np.load(DATA / "weights.npy").astype(np.float32)[1, 256:512]
    x[16:32] = 0
    block = quantize(x[None], GGMLType.Q6_K)[0]
    scales = [scale_of(list(group)) if group.any() else f32(0) for group in x.reshape(16, 16)]
    most = max(scales, key=abs)
    steps = [int(min(np.rint(scale * (f32(-128) / most)), f32(127))) for scale in scales]
    np.testing.assert_array_equal(block[192:208].view(np.int8), steps)
    half = np.float16(most / f32(-128))
    assert block[208:].view(np.float16)[0] == half
    expected = [
        f32(half) * f32(step) * (np.clip(np.rint(v * (f32(1) / (f32(half) * f32(step)))), -32, 31) if step else f32(0))
        for step, group in zip(steps, x.reshape(16, 16), strict=True)
        for v in group
    ]
    np.testing.assert_array_equal(dequantize(block[None], GGMLType.Q6_K)[0], expected)


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_a_block_does_not_depend_on_others(type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "_CHUNK_GROUPS", 504)
    rows = np.random.default_rng(4).standard_normal((5, 256 * 31)).astype(np.float32)
    whole = quantize(rows, type).reshape(-1, type.type_size)
    for i in (0, 125, 126, 154):  # beside a border of chunks, too
        np.testing.assert_array_equal(quantize(rows.reshape(-1, 256)[i : i + 1], type)[0], whole[i])


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_few_weights_of_a_block_that_are_not_zero(type: GGMLType) -> None:
    """They come back, and the zeros beside them, but for the rounding of scales to float16."""
    rows = np.zeros((4, 256), np.float32)
    rows[1], rows[2, 40], rows[3, 200] = -63 / 64, 63 / 64 * 15 * 4, -63 / 64 * 16
    back = dequantize(quantize(rows, type), type)
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_allclose(back[1:], rows[1:], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("value", [1.5, -1.5])
def test_weights_that_are_nearly_the_same(type: GGMLType, value: float) -> None:
    """They have no line of which the slope were more than rounding."""
    rows = np.full((1, 256), value, np.float32)
    rows[0, 32:64] *= np.linspace(1, 1.0002, 32, dtype=np.float32)
    rows[0, 64:] = 0.01
    back = dequantize(quantize(rows, type), type)
    np.testing.assert_allclose(back[0, :64], rows[0, :64], rtol=5e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e30])
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_weights_without_a_block_are_refused(type: GGMLType, value: float) -> None:
    rows = np.ones((2, 512), np.float32)
    rows[1, 300] = value
    with pytest.raises(UnsupportedError, match=f"^weights are not finite, or too large for {type.name}$"):
        quantize(rows, type)
