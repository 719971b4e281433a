"""Sampling: the next token of each row of logits, after penalties. The order of limits is that of SamplingParams.

The same logits and seed give the same ids on every device and in every batch, because nothing here depends on the order
of summation: weights are 64-bit integers, and ties go to the lower id. A kernel must do the float32 steps below as
written: each operation rounded to nearest, no contraction into FMA, subnormals kept, division correctly rounded.

A row whose greatest logit is not finite (a NaN or +inf somewhere, or -inf everywhere) has no distribution: `sample`
gives -1 for the engine to see without another pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op
from forge.ops.philox import random_bits

WEIGHT_BITS = 42
"""The most probable token weighs 2**42: 2**20 tokens sum to at most 2**62, and a probability of 2**-42 still counts."""

_f32 = np.float32
_MIN_TEMPERATURE = _f32(2.0**-76)  # its reciprocal times any subnormal changes no weight
_MIN_EXPONENT = _f32(-32.0)  # e**-32 < 2**-46: such a weight is 0
_LOG2E = _f32(1.4426950408889634)
_LN2_HIGH = _f32(0.693359375)  # 10 bits: exact times any exponent that occurs
_LN2_LOW = _f32(-2.12194440e-4)
_USUAL_NUCLEUS = 1024  # tokens: sorting only these is enough for most rows
_BLOCK = 16_384  # elements: temporaries stay in the cache
_STATE_WORDS = 7174  # words of 8 bytes in `Row` of sample.hip
_MIN_CHUNK = 1024  # tokens of a row that a block of the kernels takes
_MAX_CHUNKS = 512  # chunks of a row, as in sample.hip
_BLOCKS_PER_CU = 3  # blocks of 512 threads that run side by side
_EXP = tuple(_f32(c) for c in (0.001381454, 0.008368745, 0.04166839, 0.16666521, 0.49999994))


@op("logits:f32[B,V] -> ids:i32[B]")
def argmax(logits: Array) -> Array:
    """The id of each row's greatest logit, -1 where it is not finite: what `sample` gives at temperature 0."""
    ids: Array = logits.argmax(axis=1).astype(np.int32)  # the lowest id of equals; a NaN counts as the greatest
    ids[~np.isfinite(logits[np.arange(len(ids)), ids])] = -1
    return ids


@argmax.gpu
def _argmax_gpu(device: GPU, logits: Any) -> Any:
    rows = len(logits)
    ids = device.empty((rows,), np.int32)
    state, _, chunks = _find_max_logits(device, logits, None)
    device.run("sample", "argmax", rows, state, ids, chunks)
    return ids


@op(
    "logits:f32[B,V] temperature:f32[B] top_k:i32[B] top_p:f32[B] min_p:f32[B] seed:u64[B] choice:u32[B] "
    "position:u32[B] -> ids:i32[B]"
)
def sample(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seed: Array,
    choice: Array,
    position: Array,
) -> Array:
    """The next token of each row; -1 where the greatest logit is not finite. V <= 2**20.

    Temperature 0 gives the greatest logit, the lowest id of equals. Otherwise each token has a weight, `weights(...)`,
    and three limits choose the candidates, in this order: the first top_k tokens by (logit descending, id ascending),
    0 = all; the shortest prefix of them in the same order whose weights sum to ceil(top_p * sum of all of them)
    (`_top_p_weight`), 1 = all; of these the tokens that weigh at least ceil(min_p * 2**42). The most probable token
    always stays. r = `random_bits(seed, choice, position)` draws one: candidates are summed in id order, and the first
    whose running sum exceeds floor(r * sum / 2**64) is the next token.
    """
    ids = []
    bits = random_bits(seed, choice, position)
    limits = _rows(top_k, top_p, min_p)
    for z, t, r, (k, p, m) in zip(logits.astype(_f32), temperature.tolist(), bits.tolist(), limits, strict=True):
        if not np.isfinite(z.max()):
            ids.append(-1)
        elif not t > 0.0:
            ids.append(z.tolist().index(z.max()))
        else:
            kept = _plain_candidates(z, t, k, p, m)
            target = r * sum(weight for _, weight in kept) >> 64
            reached = 0
            for i, weight in kept:
                reached += weight
                if reached > target:
                    ids.append(i)
                    break
    return np.array(ids, np.int32)


def _plain_candidates(
    logits: Array, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[tuple[int, int]]:
    """(id, weight) of the tokens that can be drawn, ids ascending."""
    weight = weights(logits, logits.max(), temperature).tolist()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        need = _top_p_weight(top_p, sum(weight[i] for i in order))
        length = reached = 0
        while reached < need:
            reached += weight[order[length]]
            length += 1
        order = order[:length]
    return [(i, weight[i]) for i in sorted(order) if weight[i] >= _min_p_weight(min_p)]


def weights(logits: Array, max_logit: np.float32, temperature: float) -> Array:
    """floor(2**42 * exp((logits - max_logit) / temperature)), elementwise: f32[N] -> i64[N], values 0 to 2**42.

    In float32, with s = 1 / max(T, 2**-76): d = max((z - greatest) * s, -32), n = rint(d * log2 e),
    r = (d - n * ln2_high) - n * ln2_low, and exp(r) = ((q(r) * r) * r + r) + 1 with q of degree 4 by Horner: a minimax
    fit on [-ln2/2, ln2/2] whose own relative error is 3.1e-9. Times 2**(42 + n), which is exact, and truncated.
    Against float64 exp(d) the relative error is below 8.1e-8 before truncation (measured). exp(0) is exactly 1.
    """
    scale = _f32(1.0) / divisor(temperature)
    result = np.empty(len(logits), np.int64)
    for start in range(0, len(logits), _BLOCK):
        block = slice(start, start + _BLOCK)
        with np.errstate(over="ignore"):  # to -inf, where the weight is 0
            d = logits[block] - max_logit
            d *= scale
        np.maximum(d, _MIN_EXPONENT, out=d)
        n = np.rint(d * _LOG2E)
        d -= n * _LN2_HIGH
        d -= n * _LN2_LOW
        exp = d * _EXP[0]
        for coefficient in _EXP[1:]:
            exp += coefficient
            exp *= d
        exp *= d
        exp += d
        exp += _f32(1.0)
        exp *= ((n.astype(np.int32) + (127 + WEIGHT_BITS)) << 23).view(np.float32)  # 2**(42 + n) from its bits
        result[block] = exp
    return result


def divisor(temperature: float) -> np.float32:
    """What logits are divided by at a temperature above 0."""
    return np.maximum(_f32(temperature), _MIN_TEMPERATURE)


def _top_p_weight(p: float, total: int) -> int:
    """ceil(p * total) with p cut to 32 fractional bits and at least 2**-32.

    In 64 bits: with P = floor(p * 2**32) and total = high * 2**32 + low it is P*high + ((P*low + 2**32 - 1) >> 32).
    """
    fraction = min(max(math.floor(p * 2.0**32), 1), 1 << 32)
    return -(-fraction * total >> 32)


def _min_p_weight(min_p: float) -> int:
    """The lowest weight of a token that min_p keeps."""
    return math.ceil(min(min_p, 1.0) * (1 << WEIGHT_BITS))


def _rows(*arrays: Array) -> Iterator[tuple[Any, ...]]:
    """The values of per-row parameters, row by row, as Python numbers."""
    return zip(*(array.tolist() for array in arrays), strict=True)


@sample.cpu
def _sample_cpu(logits: Array, temperature: Array, *parameters: Array) -> Array:
    chosen: Array = argmax.run_cpu(logits)
    sampled = np.flatnonzero((chosen >= 0) & (temperature > 0.0))
    if len(sampled) == 0:
        return chosen
    *limits, seed, choice, position = (array[sampled] for array in (temperature, *parameters))
    for row, r, *own_limits in _rows(sampled, random_bits(seed, choice, position), *limits):
        ids, kept = candidates(logits[row], *own_limits)
        sums = kept.cumsum(out=kept)
        first = sums.searchsorted(r * int(sums[-1]) >> 64, side="right")
        chosen[row] = first if ids is None else ids[first]
    return chosen


def candidates(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Array | None, Array]:
    """Ids, ascending (None = all), and weights of the tokens that can be drawn. A weight is 0 where min_p forbids."""
    max_logit = logits.max()
    ids = None
    if 0 < top_k < len(logits):
        ids = first_ids(logits, top_k)
        logits = logits[ids]
    weight = weights(logits, max_logit, temperature)
    if top_p < 1.0:
        nucleus = _nucleus(logits, weight, max_logit, temperature, top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weight = weight[nucleus]
    if min_p > 0.0:
        weight[weight < _min_p_weight(min_p)] = 0
    return ids, weight


def _nucleus(logits: Array, weight: Array, max_logit: np.float32, temperature: float, p: float) -> Array:
    """Ids, ascending, of the shortest prefix by (logit descending, id ascending) whose weights sum to p of all."""
    need = _top_p_weight(p, int(weight.sum()))
    for count in (_USUAL_NUCLEUS, len(logits)):
        head = logits if count >= len(logits) else np.partition(logits, -count)[-count:]
        head = np.sort(head)[::-1]
        sums = weights(head, max_logit, temperature)
        if sums.cumsum(out=sums)[-1] >= need:
            break
    last = int(sums.searchsorted(need))
    return _first_in_order(logits, head[last], last + 1)


def first_ids(logits: Array, count: int) -> Array:
    """Ids, ascending, of the `count` greatest logits, 0 < count <= V."""
    return _first_in_order(logits, np.partition(logits, -count)[-count], count)


def _first_in_order(logits: Array, last: np.float32, count: int) -> Array:
    """Ids, ascending, of the `count` first by (logit descending, id ascending); `last` is the last one's logit."""
    mask: Array = logits >= last
    if surplus := np.count_nonzero(mask) - count:
        mask[np.flatnonzero(logits == last)[-surplus:]] = False
    return np.flatnonzero(mask)


@sample.gpu
def _sample_gpu(device: GPU, logits: Any, *parameters: Any) -> Any:
    temperature, top_k, top_p, min_p = parameters[:4]
    rows, vocabulary = logits.shape
    ids = device.empty((rows,), np.int32)
    state, size, chunks = _find_max_logits(device, logits, temperature)
    grid, cut = (chunks, rows), (vocabulary, size)
    device.run("sample", "sample_bins", grid, logits, temperature, top_k, top_p, state, ids, *cut, chunks)
    device.run("sample", "sample_list", grid, logits, temperature, top_k, top_p, min_p, state, *cut)
    device.run("sample", "sample_draw", rows, logits, *parameters, state, ids, *cut, chunks)
    return ids


def _find_max_logits(device: GPU, logits: Any, temperature: Any) -> tuple[Any, int, int]:
    """Launch the search for the greatest logit of each chunk.

    Returns the state that the next launches read, the tokens of a chunk, and the chunks of a row.
    """
    rows, vocabulary = logits.shape
    state = device.scratch((rows, _STATE_WORDS), np.uint64)
    fill = max(1, _BLOCKS_PER_CU * device.num_cus // max(1, rows))
    size = -(-vocabulary // min(fill, _MAX_CHUNKS, -(-vocabulary // _MIN_CHUNK)))
    size = -(-size // 4) * 4  # chunks begin with whole vectors
    chunks = -(-vocabulary // size)  # none is empty
    device.run("sample", "sample_greatest", (chunks, rows), logits, temperature, state, vocabulary, size, chunks)
    return state, size, chunks
