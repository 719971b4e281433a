"""float32 weights to blocks of Q4_K, Q5_K and Q6_K: a rule of our own, which every device computes to the same bits.

ggml-quants.c tries 16 to 21 scales of a group one behind the other, each from the minimum that the best one so far
has. That order is slow where many groups are computed together. Here fewer scales are tried, from a wider range and
independently, and minima are fitted again when scales are rounded. The weighted error is no larger than ggml's for
weights as matrices have them; docs/quantization.md says how large it is. Every sum adds in the order of the weights,
and every step rounds to float32, so that kernels repeat it.
"""

from __future__ import annotations

import numpy as np

from forge.formats.blocks import Bytes, Floats

FACTORS = {
    4: (12.6, 13.2, 13.6, 14.0, 14.3, 14.6, 14.9, 15.15, 15.4),
    5: (28.2, 29.0, 29.6, 30.2, 30.8, 31.4),
    6: (29.0, 29.6, 30.2, 30.8, 31.4, 31.9, 32.4),
}
"""By bits: the numbers of steps into which a group's range is divided, of 6 bits its largest weight. The best is taken.
`raw_kernels/include/quantize_k.hip` has the same."""

_DISTINCT = np.float32(2**-16)
"""A share of what codes are squared by which they differ at least, beyond what rounding makes."""
_TOO_LARGE = np.float32(2**38)
"""Where cubes of weights may overflow; Q6_K holds no more than 2**28."""


def k_minimum(bits: int, x: Floats, blocks: Bytes) -> None:
    """Q4_K and Q5_K of groups (32, n): the 8 groups of a block have scales and minima of 6 bits.

    A group's weights count as much as they are large, as in ggml: w = |x| + rms(x). Of each division into steps the
    weighted least squares of a line is computed, and once more of the codes which the best line gives. Behind the
    rounding of scales each minimum is fitted again.
    """
    most = (1 << bits) - 1
    scale, mean_code, mean = _best_lines(x, FACTORS[bits], most)
    steps = _put_sixths(blocks, 0, scale)
    minimum = np.maximum(steps * mean_code - mean, np.float32(0))
    lows = _put_sixths(blocks, 1, minimum)
    inverse = np.where(steps > 0, np.float32(1) / steps, np.float32(0))
    x += lows
    x *= inverse
    _put_codes(bits, _limited(x, most).astype(np.uint8), blocks)


def _best_lines(x: Floats, factors: tuple[float, ...], most: int) -> tuple[Floats, Floats, Floats]:
    """Of each group the scale of the best line, and weighted means of its codes and of the weights: (n,) each."""
    weight = np.abs(x)
    weight += np.sqrt(np.add.reduce(x * x) / np.float32(32))
    low = np.minimum(np.minimum.reduce(x), np.float32(0))
    size = np.maximum.reduce(x) - low
    share = x - low
    share *= np.where(size > 0, np.float32(1) / size, np.float32(0))
    shared = weight * share
    sum_w: Floats = np.add.reduce(weight)
    sum_t: Floats = np.add.reduce(shared)
    codes, scratch = np.empty_like(x), np.empty_like(x)
    sums = np.empty((3, len(factors), x.shape[1]), np.float32)  # of w l, w l l and w t l

    def add_up(place: int) -> None:
        np.add.reduce(np.multiply(weight, codes, out=scratch), axis=0, out=sums[0, place])
        np.add.reduce(np.multiply(scratch, codes, out=scratch), axis=0, out=sums[1, place])
        np.add.reduce(np.multiply(shared, codes, out=scratch), axis=0, out=sums[2, place])

    for i, factor in enumerate(factors):
        np.rint(np.multiply(share, np.float32(factor), out=codes), out=codes)
        add_up(i)
    slope, explained = _lines(sums, sum_w, sum_t)
    place = explained.argmax(axis=0)  # the first of equal ones
    place = place * sum_w.size + np.arange(sum_w.size)
    best = sums.reshape(3, -1).take(place, axis=1)
    slope, explained = (each.reshape(-1).take(place) for each in (slope, explained))
    best[:, explained == 0] = 0
    slope[explained == 0] = 0
    inverse = np.where(sum_w > 0, np.float32(1) / sum_w, np.float32(0))
    steep = np.where(slope > 0, np.float32(1) / slope, np.float32(0))
    np.subtract(share, (sum_t - slope * best[0]) * inverse, out=codes)
    _limited(np.multiply(codes, steep, out=codes), most)
    add_up(0)
    last_slope, last_explained = _lines(sums[:, 0], sum_w, sum_t)
    is_better = last_explained > explained
    slope = np.where(is_better, last_slope, slope)
    sum_l, sum_l2, sum_lt = np.where(is_better, sums[:, 0], best)
    from_zero = (low == 0) & (sum_t > slope * sum_l)  # the line begins above 0, where a minimum cannot be
    mean = sum_t * inverse
    is_level = from_zero & (sum_l2 == 0)  # weights that are nearly the same have no line: they are the last code
    slope = np.where(is_level, mean / np.float32(most), np.where(from_zero, sum_lt / sum_l2, slope))
    mean_code = np.where(is_level, np.float32(most), sum_l * inverse)
    scale = np.where(np.isfinite(sum_w), slope * size, np.float32(np.nan))
    return scale, mean_code, mean * size + low


def _lines(sums: Floats, sum_w: Floats, sum_t: Floats) -> tuple[Floats, Floats]:
    """The slopes of lines, and what they explain: 0 where codes hardly differ. sums: Of w l, w l l and w t l."""
    sum_l, sum_l2, sum_lt = sums
    squared = sum_l * sum_l
    determinant = sum_w * sum_l2 - squared
    common = sum_w * sum_lt - sum_l * sum_t
    slope: Floats = common / determinant
    explained = common * slope
    np.copyto(explained, np.float32(0), where=~(determinant > squared * _DISTINCT))
    return slope, explained


def _put_sixths(blocks: Bytes, place: int, values: Floats) -> Floats:
    """Write numbers of groups (n,) as codes of 6 bits: scales at place 0, minima at 1. What they are as stored."""
    of_blocks = values.reshape(-1, 8)
    most: Floats = np.maximum.reduce(of_blocks, axis=1)
    half = (most / np.float32(63)).astype("<f2")
    blocks[:, 2 * place : 2 * place + 2] = half.view(np.uint8).reshape(-1, 2)
    inverse = np.where(most > 0, np.float32(63) / most, np.float32(0))
    codes = np.minimum(np.rint(of_blocks * inverse[:, None]), np.float32(63)).astype(np.uint8)
    blocks[:, 4 + 4 * place : 8 + 4 * place] = codes[:, :4] | codes[:, 4:] >> 4 << 6
    rest = codes[:, 4:] & 15
    blocks[:, 12:16] = blocks[:, 12:16] | rest << 4 if place else rest
    return (half.astype(np.float32)[:, None] * codes).reshape(-1)


def q6_k(x: Floats, blocks: Bytes) -> None:
    """Q6_K of groups (16, n): the 16 groups of a block have scales of 8 bits.

    A group's weights count as their squares, as in ggml. The largest one, without its sign, is the lowest code.
    """
    scale = _best_scales(x, extreme(x)).reshape(-1, 16)
    most = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)  # the first of equal ones
    half = (most / np.float32(-128)).astype("<f2")
    inverse = np.where(most != 0, np.float32(-128) / most, np.float32(0))
    codes = np.minimum(np.rint(scale * inverse), np.float32(127)).astype(np.int8)
    blocks[:, 192:208] = codes.view(np.uint8)
    blocks[:, 208:] = half.view(np.uint8)
    step = (half.astype(np.float32) * codes).reshape(-1)
    x *= np.where(step != 0, np.float32(1) / step, np.float32(0))
    np.clip(np.rint(x, out=x), np.float32(-32), np.float32(31), out=x)
    x += np.float32(32)
    whole = x.astype(np.uint8).reshape(16, -1, 2, 4, 2).transpose(1, 2, 3, 4, 0).reshape(-1, 2, 4, 32)
    low = whole & 15  # of 4 times 32 weights of each half block
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    high = whole >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    blocks[:, 128:192] = np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)


def extreme(x: Floats) -> Floats:
    """Of each column the weight that is largest without its sign, the first of equal ones: (n,)."""
    low: Floats = np.minimum.reduce(x)
    found: Floats = np.maximum.reduce(x)
    ties = np.flatnonzero(found == -low)
    np.copyto(found, low, where=found < -low)
    if ties.size:
        tied = x[:, ties]
        found[ties] = np.take_along_axis(tied, np.abs(tied).argmax(axis=0)[None], axis=0)[0]
    return found


def _best_scales(x: Floats, largest: Floats) -> Floats:
    """Of each group the scale whose codes leave the least error, with the largest (sum w x l)**2 / sum w l l: (n,)."""
    weight = x * x
    cubes = weight * x
    unit = np.where(largest != 0, np.float32(-1) / largest, np.float32(0))
    codes, scratch = np.empty_like(x), np.empty_like(x)
    common, squares = np.empty((2, len(FACTORS[6]), x.shape[1]), np.float32)
    for i, factor in enumerate(FACTORS[6]):
        np.rint(np.multiply(x, np.float32(factor) * unit, out=codes), out=codes)
        if factor > 31.4:
            np.minimum(codes, np.float32(31), out=codes)
        np.multiply(np.multiply(weight, codes, out=scratch), codes, out=scratch)
        np.add.reduce(scratch, axis=0, out=squares[i])
        np.add.reduce(np.multiply(cubes, codes, out=codes), axis=0, out=common[i])
    found = common / squares
    found[squares == 0] = 0
    best = (common * found).argmax(axis=0)  # the first of equal ones
    scale: Floats = found.reshape(-1).take(best * largest.size + np.arange(largest.size))
    scale[~(np.abs(largest) < _TOO_LARGE)] = np.nan
    return scale


def _put_codes(bits: int, codes: Bytes, blocks: Bytes) -> None:
    """Write the codes (32, groups) of blocks: nibbles of two groups in a byte, fifth bits of eight."""
    start = 16
    if bits == 5:
        high: Bytes = np.bitwise_or.reduce((codes >> 4).reshape(32, -1, 8) << np.arange(8, dtype=np.uint8), axis=2)
        blocks[:, 16:48] = high.T
        start = 48
    pairs = codes.reshape(32, -1, 4, 2)
    nibbles = pairs[..., 0] & 15 | pairs[..., 1] << 4  # (32, blocks, 4)
    blocks[:, start:] = nibbles.transpose(1, 2, 0).reshape(len(blocks), -1)


def _limited(x: Floats, most: int) -> Floats:
    """The nearest integers from 0 to `most`, in place."""
    np.rint(x, out=x)
    return np.clip(x, np.float32(0), np.float32(most), out=x)
