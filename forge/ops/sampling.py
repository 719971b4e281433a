"""From logits to the next token: penalties, and one draw per row. Order as in SamplingParams.

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
from forge.ops.op import Array, Arrays, Case, op
from forge.ops.philox import random_bits

WEIGHT_BITS = 42
"""The most probable token weighs 2**42: 2**20 tokens sum to at most 2**62, and a probability of 2**-42 still counts."""

_INF = math.inf
_f32 = np.float32
_MIN_TEMPERATURE = _f32(2.0**-76)  # its reciprocal times any subnormal changes no weight
_MIN_EXPONENT = _f32(-32.0)  # e**-32 < 2**-46: such a weight is 0
_LOG2E = _f32(1.4426950408889634)
_LN2_HIGH = _f32(0.693359375)  # 10 bits: exact times any exponent that occurs
_LN2_LOW = _f32(-2.12194440e-4)
_USUAL_NUCLEUS = 1024  # tokens: sorting only these is enough for most rows
_BLOCK = 16_384  # elements: temporaries stay in the cache
_STATE_WORDS = 6406  # of 8 bytes: `Row` of sample.hip
_MIN_CHUNK = 1024  # tokens of a row that a block takes on a GPU
_MAX_CHUNKS = 512  # of a row, as in sample.hip
_BLOCKS_PER_CORE = 3  # that run side by side, 512 threads each
_EXP = tuple(_f32(c) for c in (0.001381454, 0.008368745, 0.04166839, 0.16666521, 0.49999994))


def weights(logits: Array, greatest: np.float32, temperature: float) -> Array:
    """floor(2**42 * exp((logits - greatest) / temperature)), elementwise: f32[N] -> i64[N], values 0 to 2**42.

    In float32, with s = 1 / max(T, 2**-76): d = max((z - greatest) * s, -32), n = rint(d * log2 e),
    r = (d - n * ln2_high) - n * ln2_low, and exp(r) = ((q(r) * r) * r + r) + 1 with q of degree 4 by Horner: a minimax
    fit on [-ln2/2, ln2/2] whose own relative error is 3.1e-9. Times 2**(42 + n), which is exact, and truncated.
    Against float64 exp(d) the relative error is below 8.1e-8 before truncation (measured). exp(0) is exactly 1.
    """
    scale = _f32(1.0) / np.maximum(_f32(temperature), _MIN_TEMPERATURE)
    result = np.empty(len(logits), np.int64)
    for start in range(0, len(logits), _BLOCK):
        block = slice(start, start + _BLOCK)
        with np.errstate(over="ignore"):  # to -inf, where the weight is 0
            d = logits[block] - greatest
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


def _share(p: float, total: int) -> int:
    """ceil(p * total) with p cut to 32 fractional bits and at least 2**-32.

    In 64 bits: with P = floor(p * 2**32) and total = high * 2**32 + low it is P*high + ((P*low + 2**32 - 1) >> 32).
    """
    fraction = min(max(math.floor(p * 2.0**32), 1), 1 << 32)
    return -(-fraction * total >> 32)


def _floor_weight(min_p: float) -> int:
    """The least weight that min_p keeps."""
    return math.ceil(min(min_p, 1.0) * (1 << WEIGHT_BITS))


def _rows(*arrays: Array) -> Iterator[tuple[Any, ...]]:
    """The values of per-row parameters, row by row, as Python numbers."""
    return zip(*(array.tolist() for array in arrays), strict=True)


def _first_in_order(logits: Array, last: np.float32, count: int) -> Array:
    """Ids, ascending, of the `count` first by (logit descending, id ascending); `last` is the last one's logit."""
    mask: Array = logits >= last
    if surplus := np.count_nonzero(mask) - count:
        mask[np.flatnonzero(logits == last)[-surplus:]] = False
    return np.flatnonzero(mask)


def first_ids(logits: Array, count: int) -> Array:
    """Ids, ascending, of the `count` greatest logits, 0 < count <= V."""
    return _first_in_order(logits, np.partition(logits, -count)[-count], count)


def _nucleus(logits: Array, weight: Array, greatest: np.float32, temperature: float, p: float) -> Array:
    """Ids, ascending, of the shortest prefix by (logit descending, id ascending) whose weights reach p of their sum."""
    need = _share(p, int(weight.sum()))
    for count in (_USUAL_NUCLEUS, len(logits)):
        head = logits if count >= len(logits) else np.partition(logits, -count)[-count:]
        head = np.sort(head)[::-1]
        sums = weights(head, greatest, temperature)
        if sums.cumsum(out=sums)[-1] >= need:
            break
    last = int(sums.searchsorted(need))
    return _first_in_order(logits, head[last], last + 1)


def _kept(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Array | None, Array]:
    """Ids (None = all), ascending, and weights of the tokens that can be drawn; 0 where min_p forbids one."""
    greatest = logits.max()
    ids = None
    if 0 < top_k < len(logits):
        ids = first_ids(logits, top_k)
        logits = logits[ids]
    weight = weights(logits, greatest, temperature)
    if top_p < 1.0:
        nucleus = _nucleus(logits, weight, greatest, temperature, top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weight = weight[nucleus]
    if min_p > 0.0:
        weight[weight < _floor_weight(min_p)] = 0
    return ids, weight


def _sample_cpu(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seed: Array,
    choice: Array,
    position: Array,
) -> Array:
    chosen: Array = argmax.run_cpu(logits)
    sampled = np.flatnonzero((chosen >= 0) & (temperature > 0.0))
    if len(sampled) == 0:
        return chosen
    bits = random_bits(seed[sampled], choice[sampled], position[sampled])
    parameters = _rows(sampled, bits, temperature[sampled], top_k[sampled], top_p[sampled], min_p[sampled])
    for row, r, *limits in parameters:
        ids, kept = _kept(logits[row], *limits)
        sums = kept.cumsum(out=kept)
        first = sums.searchsorted(r * int(sums[-1]) >> 64, side="right")
        chosen[row] = first if ids is None else ids[first]
    return chosen


def _sample_gpu(
    device: GPU,
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seed: Any,
    choice: Any,
    position: Any,
) -> Any:
    rows, vocabulary = logits.shape
    ids = device.empty((rows,), np.int32)
    state, size, chunks = _greatest(device, logits, temperature)
    grid, cut = (chunks, rows), (vocabulary, size)
    device.run("sample", "sample_bins", grid, logits, temperature, top_k, top_p, state, ids, *cut, chunks)
    device.run("sample", "sample_list", grid, logits, temperature, top_k, top_p, min_p, state, *cut)
    limits, draw = (top_k, top_p, min_p), (seed, choice, position)
    device.run("sample", "sample_draw", rows, logits, temperature, *limits, *draw, state, ids, *cut, chunks)
    return ids


def _greatest(device: GPU, logits: Any, temperature: Any) -> tuple[Any, int, int]:
    """Find the greatest logit of each chunk: what the next launches read, ids of a chunk, and chunks of a row."""
    rows, vocabulary = logits.shape
    state = device.scratch((rows, _STATE_WORDS), np.uint64)
    fill = max(1, _BLOCKS_PER_CORE * device.num_cus // max(1, rows))
    size = -(-vocabulary // min(fill, _MAX_CHUNKS, -(-vocabulary // _MIN_CHUNK)))
    chunks = -(-vocabulary // size)  # none is empty
    device.run("sample", "sample_greatest", (chunks, rows), logits, temperature, state, vocabulary, size, chunks)
    return state, size, chunks


def _argmax_gpu(device: GPU, logits: Any) -> Any:
    rows = len(logits)
    ids = device.empty((rows,), np.int32)
    state, _, chunks = _greatest(device, logits, None)
    device.run("sample", "argmax", rows, state, ids, chunks)
    return ids


@op(
    "logits:f32[B,V] -> ids:i32[B]",
    cases=[
        Case(
            "the lowest id of equals, -1 without a distribution",
            lambda _: (np.array([[1, 3, 3], [-_INF, -2, -_INF], [0, math.nan, 0], [-_INF] * 3, [0, _INF, 0]], _f32),),
            expected=([1, 1, -1, -1, -1],),
        ),
        Case(
            "a NaN of either sign", lambda _: (np.array([[0, math.nan], [-math.nan, 0]], _f32),), expected=([-1, -1],)
        ),
        Case("zeros of both signs", lambda _: (np.array([[-1, -0.0, 0.0, -0.0]], _f32),), expected=([1],)),
        Case("one token", lambda _: (np.array([[-7]], _f32),), expected=([0],)),
        Case("chunks", lambda rng: (rng.normal(0, 3, (2, 5000)).round().astype(_f32),)),
        Case("more rows than chunks", lambda rng: (rng.normal(0, 3, (70, 1100)).astype(_f32),)),
    ],
    gpu=_argmax_gpu,
)
def argmax(logits: Array) -> Array:
    """What `sample` gives at temperature 0: the id of each row's greatest logit, -1 where that is not finite."""
    ids: Array = logits.argmax(axis=1).astype(np.int32)  # the lowest id of equals; a NaN counts as the greatest
    ids[~np.isfinite(logits[np.arange(len(ids)), ids])] = -1
    return ids


def _kept_plain(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> list[tuple[int, int]]:
    """(id, weight), ids ascending, of the tokens that can be drawn."""
    weight = weights(logits, logits.max(), temperature).tolist()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        need = _share(top_p, sum(weight[i] for i in order))
        length = reached = 0
        while reached < need:
            reached += weight[order[length]]
            length += 1
        order = order[:length]
    return [(i, weight[i]) for i in sorted(order) if weight[i] >= _floor_weight(min_p)]


def _sampling_cases() -> list[Case]:
    def rows(logits: list[list[float]], *limits: tuple[float, int, float, float]) -> Arrays:
        temperature, top_k, top_p, min_p = zip(*limits, strict=True)
        zero = np.zeros(len(limits), np.uint32)
        return (
            np.array(logits, _f32), np.array(temperature, _f32), np.array(top_k, np.int32), np.array(top_p, _f32),
            np.array(min_p, _f32), zero.astype(np.uint64), zero, zero,
        )  # fmt: skip

    def random(rng: np.random.Generator, b: int, v: int, step: float = 0.0) -> Arrays:
        """`step` rounds the logits, which makes ties."""
        logits = rng.normal(0.0, 3.0, (b, v))
        logits = np.round(logits / step) * step if step else logits
        logits[rng.random((b, v)) < 0.05] = -np.inf
        logits[:, 0] = 1.0
        return (
            logits.astype(_f32),
            rng.choice([0.0, 0.1, 0.8, 1.0, 5.0, 100.0], b).astype(_f32),
            rng.choice([0, 1, 7, 50, v, 2 * v], b).astype(np.int32),
            rng.choice([1e-6, 0.3, 0.9, 0.95, 1.0], b).astype(_f32),
            rng.choice([0.0, 0.01, 0.3, 1.0], b).astype(_f32),
            rng.integers(0, 2**64, b, np.uint64),
            rng.integers(0, 8, b).astype(np.uint32),
            rng.integers(0, 2**17, b).astype(np.uint32),
        )

    def seeded(arguments: Arrays, seed: int) -> Arrays:
        return (*arguments[:5], np.full(len(arguments[0]), seed, np.uint64), *arguments[6:])

    # Seed, choice and position 0 give the bits 0xe169c58d6627e8d5, a fraction of 0.8805.
    inf, nan = _INF, math.nan
    greedy, plain = (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0)
    return [
        Case(
            "greedy: the lowest id of equals, -1 without a distribution",
            lambda _: rows([[1, 3, 3], [-inf, -2, -inf], [0, nan, 0], [-inf] * 3, [0, inf, 0]], *[greedy] * 5),
            expected=([1, 1, -1, -1, -1],),
        ),
        Case(
            "drawn without a distribution",
            lambda _: rows([[0, nan, 0], [-inf] * 3, [0, inf, 0], [0, -nan, 0]], *[plain] * 4),
            expected=([-1, -1, -1, -1],),
        ),
        Case(
            "four equals: 0.8805 of all 4, of the first 2 (k), 2 (p), 3 (p), 2 of 3 (k then p)",
            lambda _: rows([[5.0] * 4] * 5, plain, (1, 2, 1, 0), (1, 0, 0.5, 0), (1, 0, 0.75, 0), (1, 3, 0.5, 0)),
            expected=([3, 1, 1, 2, 1],),
        ),
        Case(
            "1 : e : 0.8: all; 0.8 is below min_p = 0.3 e; the one token left by p and by min_p",
            lambda _: rows([[0, 1, -0.2231]] * 4, plain, (1.0, 0, 1.0, 0.3), (1.0, 0, 1e-9, 0.0), (1.0, 0, 1.0, 1.0)),
            expected=([2, 1, 1, 1],),
        ),
        Case(
            "two tokens, of which the first has less than p by less than 1 of 2**43: a share rounds up",
            lambda _: rows([[0.0, -0.06276973]], (1.0, 0, 0.5156873, 0.0)),
            expected=([1],),
        ),
        Case(
            "a token of weight 8139031, which the seed draws, and one of 2**42; min_p of 8139031.5 / 2**42 rounds up",
            lambda _: seeded(rows([[0.0, -13.2]] * 2, plain, (1.0, 0, 1.0, 1.8506015e-06)), 151_054),
            expected=([1, 0],),
        ),
        Case(
            "as many equals as a list holds, one fewer and one more: 0.8805 of half of them",
            lambda _: rows([[5.0] * n + [-inf] * (2049 - n) for n in (2047, 2048, 2049)], *[(1, 0, 0.5, 0)] * 3),
            expected=([901, 901, 902],),
        ),
        Case("one token", lambda _: rows([[-7.0]] * 2, greedy, (0.5, 3, 0.5, 0.5)), expected=([0, 0],)),
        Case("random", lambda rng: random(rng, 16, 1000)),
        Case("many ties", lambda rng: random(rng, 16, 257, step=2.0)),
        Case(
            "0.8805 of 3000 equals, of the first 2500 (k), 1500 (p), 1250 (k then p)",
            lambda _: rows([[5.0] * 3000] * 4, plain, (1, 2500, 1, 0), (1, 0, 0.5, 0), (1, 2500, 0.5, 0)),
            expected=([2641, 2201, 1320, 1100],),
        ),
        Case("chunks", lambda rng: random(rng, 4, 5000)),
        Case("chunks, many ties", lambda rng: random(rng, 4, 5000, step=0.25)),
    ]


@op(
    "logits:f32[B,V] temperature:f32[B] top_k:i32[B] top_p:f32[B] min_p:f32[B]"
    " seed:u64[B] choice:u32[B] position:u32[B] -> ids:i32[B]",
    cases=_sampling_cases(),
    cpu=_sample_cpu,
    gpu=_sample_gpu,
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

    Temperature 0: the greatest logit, the lowest id of equals. Otherwise tokens weigh `weights(...)`, and of them stay
    the first top_k (0 = all) by (logit descending, id ascending); of these the shortest prefix in that order whose
    weights reach ceil(top_p * their sum) (`_share`; 1 = all); of these what weighs at least ceil(min_p * 2**42). The
    most probable token always stays. With r = `random_bits(seed, choice, position)` the id is the first in id order up
    to which the weights that stay sum to more than floor(r * their sum / 2**64).
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
            kept = _kept_plain(z, t, k, p, m)
            target = r * sum(weight for _, weight in kept) >> 64
            reached = 0
            for i, weight in kept:
                reached += weight
                if reached > target:
                    ids.append(i)
                    break
    return np.array(ids, np.int32)


def _penalize_cpu(
    logits: Array, counts: Array, bias: Array, repetition: Array, presence: Array, frequency: Array
) -> Array:
    result = logits.copy()
    with np.errstate(all="ignore"):  # `sample` sees what overflows
        row, token = _places(bias)
        result[row, token] += bias[row, token]
        row, token = _places(counts)
        z, r, generated = result[row, token], repetition[row], counts[row, token] - 1
        z = np.where(z > 0, z / r, z * r)
        penalized = (z - presence[row]) - frequency[row] * generated.astype(logits.dtype)
    result[row, token] = np.where(generated > 0, penalized, z)
    return result


def _places(array: Array) -> tuple[Array, Array]:
    """Row and column of what is not 0, of which there is little."""
    return np.divmod(np.flatnonzero(array != 0), array.shape[1])


def _penalize_gpu(device: GPU, logits: Any, *changes: Any) -> Any:
    rows, vocabulary = logits.shape
    result = device.empty((rows, vocabulary), np.float32)
    device.run("penalize", "penalize", (-(-vocabulary // 256), rows), logits, *changes, result, vocabulary)
    return result


def _penalty_cases() -> list[Case]:
    def arguments(logits: Any, counts: Any, penalties: Any, bias: Any) -> Arrays:
        """Three penalties for each row."""
        repetition, presence, frequency = np.array(penalties, _f32).T.copy()
        return np.array(logits, _f32), np.array(counts, np.int32), np.array(bias, _f32), repetition, presence, frequency

    def random(rng: np.random.Generator, b: int, v: int) -> Arrays:
        bias = np.where(rng.random((b, v)) < 0.1, rng.normal(size=(b, v)), 0)
        penalties = rng.uniform((0.5, -1, -1), (2, 1, 1), (b, 3))
        return arguments(rng.normal(0, 3, (b, v)), rng.integers(0, 5, (b, v)), penalties, bias)

    return [
        Case(
            "by hand: once, twice and not yet generated; forbidden; no penalties",
            lambda _: arguments(
                [[2, -2, 4, 1, 8], [1, 2, 3, 4, 5]],
                [[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]],
                [(2, 0.5, 0.25), (9, 9, 9)],
                [[0, 1, 0, -_INF, 0], [5, 0, 0, 0, 0]],
            ),
            expected=([[1, -2.75, 1, -_INF, 8], [6, 2, 3, 4, 5]],),
        ),
        Case(
            "forbidden tokens",
            lambda rng: arguments(rng.normal(size=(1, 3)), [[1, 0, 2]], [(2, 1, 1)], [[-_INF, 0, -_INF]]),
        ),
        Case("random", lambda rng: random(rng, 5, 64)),
        Case("more than a block", lambda rng: random(rng, 2, 300)),
        Case("one token", lambda rng: random(rng, 1, 1)),
    ]


@op(
    "logits:f32[B,V] counts:i32[B,V] bias:f32[B,V] repetition:f32[B] presence:f32[B] frequency:f32[B]"
    " -> penalized:f32[B,V]",
    cases=_penalty_cases(),
    cpu=_penalize_cpu,
    gpu=_penalize_gpu,
    gpu_rtol=1e-6,
    gpu_atol=1e-6,
)
def penalize(logits: Array, counts: Array, bias: Array, repetition: Array, presence: Array, frequency: Array) -> Array:
    """Logits with logit bias, repetition, presence and frequency penalties.

    counts are 0 for tokens that are not in the row's text, 1 for those only in its prompt, and 1 + g for those that
    were generated g times. In float32, in this order: z = z + bias, where that is not 0; where there is a count,
    z = z / repetition if z > 0 else z * repetition (arXiv:1909.05858); where it was generated,
    z = (z - presence) - frequency * g.
    """
    result = logits.copy()
    for b, t in np.ndindex(*logits.shape):
        z, generated = logits[b, t], counts[b, t] - 1
        if bias[b, t] != 0:
            z = z + bias[b, t]
        if generated >= 0:
            z = z / repetition[b] if z > 0 else z * repetition[b]
        if generated > 0:
            z = (z - presence[b]) - frequency[b] * logits.dtype.type(generated)
        result[b, t] = z
    return result
