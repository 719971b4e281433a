"""float32 weights to blocks of Q4_K, Q5_K and Q6_K: a rule of our own, which every device computes to the same bits.

ggml-quants.c tries 16 to 21 scales of a group one behind the other, each from the minimum that the best one so far has.
Here 8 to 10 are compared by sums of small whole numbers. A weight is a place from 0 to 4096 in its group's range, and
the low bits of a multiple of it say how far it is from the nearest code. The least error behind a line through these
distances, weighted, chooses the scale. Codes by that line give the weighted least squares of the weights themselves,
and those once more; minima are fitted again when scales are rounded. docs/quantization.md compares the errors.

Whole numbers add to the same in any order. Sums of float32 add in the order of the weights, and every step rounds, so
that kernels repeat it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.formats.blocks import Bytes, Floats
from forge.formats.scratch import scratch

Shorts = NDArray[np.int16]

CANDIDATES = {4: range(210, 250, 4), 5: range(453, 509, 7), 6: range(456, 520, 8)}
"""By bits, in sixteenths: the numbers of steps into which a group's range is divided, of 6 bits its largest weight. A
step is 2**16 of their multiples of places. At most 16. `raw_kernels/include/quantize_lines.hip` has the same."""

_DISTINCT = np.float32(2**-16)
"""A share of what codes are squared by which they differ at least, beyond what rounding makes."""


def k_minimum(bits: int, x: Floats, blocks: Bytes) -> None:
    """Q4_K and Q5_K of groups (32, n): the 8 groups of a block have scales and minima of 6 bits.

    A group's weights count as much as they are large, as in ggml: w = |x| + rms(x). Behind the rounding of scales each
    minimum is fitted again.
    """
    most = (1 << bits) - 1
    scale, mean_code, mean = _best_lines(x, CANDIDATES[bits], most)
    steps = _put_sixths(blocks, 0, scale)
    minimum = np.maximum(steps * mean_code - mean, np.float32(0))
    lows = _put_sixths(blocks, 1, minimum)
    inverse = np.where(steps > 0, np.float32(1) / steps, np.float32(0))
    x += lows
    x *= inverse
    _put_codes(bits, _limited(x, most).astype(np.uint8), blocks)


def _best_lines(x: Floats, candidates: range, most: int) -> tuple[Floats, Floats, Floats]:
    """Of each group the scale of the best line, and weighted means of its codes and of the weights: (n,) each."""
    codes = _like(x, "codes")
    rms = np.sqrt(np.add.reduce(np.multiply(x, x, out=codes)) / np.float32(32))
    weight = np.abs(x, out=_like(x, "weight"))
    weight *= _over(4, rms)
    weight += np.float32(4)
    low = np.minimum(np.minimum.reduce(x), np.float32(0))
    size = np.maximum.reduce(x) - low
    share = np.subtract(x, low, out=_like(x, "share"))
    share *= _over(4096, size)
    steep, start = _likely_lines(share, weight, candidates)
    shared = np.multiply(weight, share, out=_like(x, "shared"))
    sum_w: Floats = np.add.reduce(weight)
    sum_t: Floats = np.add.reduce(shared)

    def fitted(steep: Floats, start: Floats) -> tuple[Floats, Floats, Floats]:
        """Sums of w l, w l l and w t l, where l are the codes by a line; then as `_lines`."""
        np.multiply(share, steep, out=codes)
        _limited(np.subtract(codes, start, out=codes), most)
        sums, product = np.empty((3, x.shape[1]), np.float32), _like(x, "product")
        np.add.reduce(np.multiply(weight, codes, out=product), axis=0, out=sums[0])
        np.add.reduce(np.multiply(product, codes, out=product), axis=0, out=sums[1])
        np.add.reduce(np.multiply(shared, codes, out=product), axis=0, out=sums[2])
        return sums, *_lines(sums, sum_w, sum_t)

    best, slope, explained = fitted(steep, start)
    best[:, explained == 0] = 0
    slope[explained == 0] = 0
    steep = _over(1, slope)
    mean = sum_t / sum_w
    last, last_slope, last_explained = fitted(steep, (mean - slope * (best[0] / sum_w)) * steep)
    is_better = last_explained > explained
    slope = np.where(is_better, last_slope, slope)
    sum_l, sum_l2, sum_lt = np.where(is_better, last, best)
    from_zero = (low == 0) & (sum_t > slope * sum_l)  # the line begins above 0, where a minimum cannot be
    is_level = from_zero & (sum_l2 == 0)  # weights that are nearly the same have no line: they are the last code
    slope = np.where(is_level, mean / np.float32(most), np.where(from_zero, sum_lt / sum_l2, slope))
    mean_code = np.where(is_level, np.float32(most), sum_l / sum_w)
    unit = size * np.float32(1 / 4096)
    scale = np.where(np.isfinite(rms), slope * unit, np.float32(np.nan))
    return scale, mean_code, mean * unit + low


def _likely_lines(share: Floats, weight: Floats, candidates: range) -> tuple[Floats, Floats]:
    """Of each group the line that leaves the least error: a code is share * steep - start. (n,) each.

    Weights are quarters of the group's root mean square, together at most 256, and distances 32nds of a step, so sums
    have 16 bits. Of weights that are all the same 2**16 may become 0, here as on a device: it makes no difference.
    """
    places, weights = _whole(share, "places"), scratch("weights", (2, *share.shape), np.int16)
    whole, leaned = weights
    np.copyto(whole, weight, casting="unsafe")
    at = np.right_shift(places, 8, out=_like(places, "distance"))
    at -= np.int16(8)
    np.multiply(whole, at, out=leaned)
    sum_w = np.add.reduce(whole, axis=0, dtype=np.int16).astype(np.float32)
    mean = np.add.reduce(leaned, axis=0, dtype=np.int16).astype(np.float32) / sum_w
    spread = np.einsum("ij,ij->j", leaned, at).astype(np.float32) - sum_w * mean * mean
    inverse = np.where(spread > 1, np.float32(1) / spread, np.float32(0))
    error, shift, tilt = _distances(places, candidates, whole, weights)
    tilt -= shift * mean
    error -= shift * shift / sum_w
    error -= tilt * tilt * inverse
    best, factor = _least(error, candidates)
    shift, tilt = shift.take(best) / sum_w, np.clip(tilt.take(best) * inverse, np.float32(-4), np.float32(4))
    start = (shift + np.float32(0.5) - tilt * (mean + np.float32(8.5))) * np.float32(1 / 32)
    return (factor - tilt * np.float32(0.5)) * np.float32(1 / 4096), start


def _distances(places: Shorts, candidates: range, weight: Shorts, others: Shorts) -> Any:
    """Sums (1 + others, candidates, n) of w q q, and of others times q: q are the distances to the nearest codes, in
    32nds of a step, rounded down."""
    shape = 1 + len(others), len(candidates), places.shape[1]
    sums, distance = scratch("sums", shape, np.int16), _like(places, "distance")
    for i, factor in enumerate(candidates):
        np.right_shift(np.multiply(places, np.int16(factor), out=distance), np.int16(11), out=distance)
        np.einsum("ij,ij,ij->j", weight, distance, distance, out=sums[0, i])
        np.einsum("kij,ij->kj", others, distance, out=sums[1:, i])
    found = scratch("found", shape, np.float32)
    np.copyto(found[0], sums[0].view(np.uint16))
    np.copyto(found[1:], sums[1:])
    return found


def _least(error: Floats, candidates: range) -> tuple[NDArray[np.int64], Floats]:
    """Where in (candidates, n) the least error of each group is, and how many steps that candidate has: (n,) each.

    A number's lowest four bits become the candidate's: then the least number says which it is.
    """
    factors = np.array(candidates, np.int32)
    error *= np.float32(1) / (factors * factors).astype(np.float32)[:, None]
    bits = error.view(np.int32)
    bits &= np.int32(-16)
    bits |= np.arange(len(candidates), dtype=np.int32)[:, None]
    chosen = np.minimum.reduce(bits) & 15
    places = chosen * np.int64(chosen.size) + np.arange(chosen.size)
    return places, factors.take(chosen).astype(np.float32) * np.float32(1 / 16)


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
    of_blocks = values.reshape(-1, 8).T.copy()
    most: Floats = np.maximum.reduce(of_blocks)
    half = (most / np.float32(63)).astype("<f2")
    blocks[:, 2 * place : 2 * place + 2] = half.view(np.uint8).reshape(-1, 2)
    of_blocks *= np.where(most > 0, np.float32(63) / most, np.float32(0))
    codes = np.minimum(np.rint(of_blocks, out=of_blocks), np.float32(63)).astype(np.uint8)
    blocks[:, 4 + 4 * place : 8 + 4 * place] = (codes[:4] | codes[4:] >> 4 << 6).T
    rest = (codes[4:] & 15).T
    blocks[:, 12:16] = blocks[:, 12:16] | rest << 4 if place else rest
    return (half.astype(np.float32) * codes).T.reshape(-1)


def q6_k(x: Floats, blocks: Bytes) -> None:
    """Q6_K of groups (16, n): the 16 groups of a block have scales of 8 bits.

    A group's weights count as their squares, as in ggml. The largest one, without its sign, is the lowest code.
    """
    scale = _best_scales(x, extreme(x)).reshape(-1, 16).T.copy()
    most = extreme(scale)
    half = (most / np.float32(-128)).astype("<f2")
    scale *= np.where(most != 0, np.float32(-128) / most, np.float32(0))
    codes = np.minimum(np.rint(scale, out=scale), np.float32(127)).astype(np.int8)
    blocks[:, 192:208] = codes.view(np.uint8).T
    blocks[:, 208:] = half.view(np.uint8).reshape(-1, 2)
    step = (half.astype(np.float32) * codes).T.reshape(-1)
    x *= np.where(step != 0, np.float32(1) / step, np.float32(0))
    np.clip(np.rint(x, out=x), np.float32(-32), np.float32(31), out=x)
    x += np.float32(32)
    words = x.astype(np.uint8).view("<u8")  # a code of each of 8 groups, half a block
    low = words & np.uint64(0x0F0F0F0F0F0F0F0F)
    low |= low >> np.uint64(28)  # with the group 4 on
    blocks[:, :128] = low.astype("<u4").view(np.uint8).T.reshape(-1, 128)
    high = words >> np.uint64(4) & np.uint64(0x0303030303030303)
    high |= high >> np.uint64(14)  # with the group 2 on
    high |= high >> np.uint64(28)
    blocks[:, 128:192] = high.astype("<u2").view(np.uint8).T.reshape(-1, 64)


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
    """Of each group the scale that leaves the least error to its codes, sum w x l / sum w l l: (n,).

    The largest weight, without its sign, is a lowest code. One of the other sign may be beyond the last code, 31: that
    adds to the error of such candidates.
    """
    share = np.multiply(x, _over(-4096, largest), out=_like(x, "share"))
    weight = np.multiply(share, share, out=_like(x, "weight"))
    total = np.add.reduce(weight)
    product = np.multiply(weight, _over(255, total), out=_like(x, "product"))
    whole, places = _whole(product, "whole"), _whole(share, "places")
    places += np.int16(2)
    at = np.add(places, np.int16(256), out=_like(places, "distance"))
    at >>= np.int16(9)
    leaned = np.multiply(whole, at, out=_like(places, "leaned"))
    inverse = _over(1, np.einsum("ij,ij->j", leaned, at).astype(np.float32))
    error, tilt = _distances(places, CANDIDATES[6], whole, leaned[None])
    error -= tilt * tilt * inverse
    high = np.maximum.reduce(share)
    lost = high * high * _over(255 * 2048, total)
    for factor, of_factor in zip(CANDIDATES[6], error, strict=True):
        if factor > 31.5 * 16:
            of_factor += np.maximum(high * np.float32(factor / 65536) - np.float32(31.5), np.float32(0)) * lost
    best, steps = _least(error, CANDIDATES[6])
    steep = (steps - tilt.take(best) * inverse * np.float32(0.25)) * np.float32(1 / 4096)
    codes = np.multiply(share, steep, out=_like(x, "codes"))
    np.clip(np.rint(codes, out=codes), np.float32(-32), np.float32(31), out=codes)
    np.multiply(weight, codes, out=product)
    common = np.add.reduce(np.multiply(product, share, out=share))
    slope = common * _over(1, np.add.reduce(np.multiply(product, codes, out=product)))
    scale: Floats = slope * (largest * np.float32(-1 / 4096))
    scale += np.float32(0)  # zero has no sign
    return scale


def _over(number: float, x: Floats) -> Floats:
    """number / x, and 0 where that is infinite."""
    quotient: Floats = np.float32(number) / x
    quotient[~np.isfinite(quotient)] = 0
    return quotient


def _like(x: NDArray[Any], name: str) -> NDArray[Any]:
    return scratch(name, x.shape, x.dtype)


def _whole(x: Floats, name: str) -> Shorts:
    """The whole numbers towards 0."""
    whole: Shorts = scratch(name, x.shape, np.int16)
    np.copyto(whole, x, casting="unsafe")
    return whole


def _put_codes(bits: int, codes: Bytes, blocks: Bytes) -> None:
    """Write the codes (32, groups) of blocks: nibbles of two groups in a byte, fifth bits of eight."""
    start = 16
    if bits == 5:
        high = codes.view("<u8") >> np.uint64(4) & np.uint64(0x0101010101010101)  # a bit of each of a block's 8 groups
        for shift in (7, 14, 28):
            high |= high >> np.uint64(shift)
        blocks[:, 16:48] = high.astype(np.uint8).T
        start = 48
    pairs = codes.view("<u2") & 0x0F0F
    nibbles = (pairs | pairs >> 4).astype(np.uint8).reshape(32, -1, 4)
    blocks[:, start:] = nibbles.transpose(1, 2, 0).reshape(len(blocks), -1)


def _limited(x: Floats, most: int) -> Floats:
    """The nearest integers from 0 to `most`, in place."""
    np.rint(x, out=x)
    return np.clip(x, np.float32(0), np.float32(most), out=x)
