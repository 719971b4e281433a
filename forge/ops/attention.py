"""Paged attention, and its unfused steps for looking inside.

The KV cache is pages of P positions; a sequence's page table lists its pages in order. A batch is ragged: the queries
of sequence b are rows starts[b] to starts[b + 1], the last of its lengths[b] positions. Prefill, decode and mixtures of
the two are the same call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.errors import UnsupportedError
from forge.ops.matmul import Slices
from forge.ops.op import Array, Arrays, Case, op

_QUERY_BLOCK = 128
"""Most queries handled together on NumPy."""
_SCORE_BYTES = 64 << 20
"""Size of their score matrix: with many heads or a long context, fewer go together."""
_SMALL_SCORES = 1200
"""Scores per KV head up to which OpenBLAS multiplies q by k without packing them: four times as fast for one query."""


def _case(
    name: str,
    queries: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    page_size: int = 4,
    window: int = 0,
    softcap: float = 0.0,
) -> Case:
    num_heads, num_kv_heads = heads

    def make(rng: np.random.Generator) -> Arrays:
        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        needed = [-(-length // page_size) for length in lengths]
        pages = sum(needed) + 2
        shuffled = rng.permutation(pages).astype(np.int32)
        table = np.full((len(lengths), max(needed)), -1, np.int32)
        k, v = np.full((2, pages, page_size, num_kv_heads, dim), np.nan, np.float32)  # unused slots poison a result
        start = 0
        for row, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            # runs of neighbouring pages and scattered ones
            table[row, :count] = (
                np.sort(shuffled[start : start + count]) if row % 2 else shuffled[start : start + count]
            )
            start += count
            for position in range(length):
                page, offset = table[row, position // page_size], position % page_size
                k[page, offset], v[page, offset] = normal(num_kv_heads, dim), normal(num_kv_heads, dim)
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        q = normal(sum(queries), num_heads, dim)
        return q, k, v, starts, np.array(lengths, np.int32), table, dim**-0.5, window, softcap

    return Case(name, make)


def _by_hand(rng: np.random.Generator) -> Arrays:
    """Scores 0 and ln 3 (key 1 at the second position): weights 1/4 and 3/4 over values 8 and 16."""
    q = np.array([[[np.log(3)]]], np.float32)
    k = np.array([[[[0]], [[1]]]], np.float32)
    v = np.array([[[[8]], [[16]]]], np.float32)
    return q, k, v, np.array([0, 1], np.int32), np.array([2], np.int32), np.array([[0]], np.int32), 1.0, 0, 0.0


_CASES = [
    _case("decode, one position", [1], [1], (2, 1), 8),
    _case("decode at page edges", [1, 1, 1, 1], [3, 4, 5, 17], (6, 2), 64),
    _case("decode in several runs", [1, 1], [700, 150], (16, 1), 16, 64),
    _case("more query heads than a run may have scores", [1], [3], (1500, 1), 4),
    _case("prefill", [9], [9], (4, 4), 32),
    _case("prefill after a cached part", [5], [23], (4, 2), 32),
    _case("longer than a query block", [130, 140], [130, 300], (2, 1), 16, 64),
    _case("mixed", [1, 6, 1, 2], [12, 6, 1, 9], (8, 2), 80),
    _case("window", [1, 20, 7], [30, 20, 19], (4, 2), 16, 4, 6),
    _case("window of one", [1, 3], [9, 3], (2, 2), 16, 4, 1),
    _case("window as long as the context", [1, 16], [16, 16], (2, 2), 16, 4, 16),
    _case("soft cap", [1, 11], [25, 11], (4, 1), 256, 8, 0, 2.0),
    _case("window and soft cap", [33], [40], (4, 2), 24, 8, 10, 1.5),
    # Decode: parts of the context (128 positions at least), and positions that a block takes in a turn.
    *(
        _case(f"decode of {length}", [1], [length], (2, 1), 64, 16)
        for length in (15, 16, 17, 63, 64, 65, 127, 128, 129)
    ),
    _case("decode of long contexts", [1, 1, 1], [1, 129, 1023], (4, 2), 64, 16),
    _case("decode, more positions than parts take at least", [1], [1500], (8, 8), 32, 16),
    _case("decode, eight heads together, window over parts", [1, 1], [400, 90], (8, 1), 128, 16, 200),
    _case("decode, window shorter than a part", [1, 1], [700, 20], (4, 1), 64, 16, 50),
    _case("decode, soft cap over parts", [1], [300], (2, 1), 64, 16, 0, 2.0),
    *(_case(f"decode, {heads} heads of one KV head", [1, 1], [70, 9], (heads, 1), 32, 16) for heads in (3, 5, 9, 17)),
    *(
        _case(f"decode, heads of {dim}", [1, 1], [20, 37], (6, 2), dim, 16)
        for dim in (4, 20, 36, 80, 96, 100, 128, 192, 256)
    ),
    # Prefill: tiles of 32 queries of one head, and of 32 keys.
    *(_case(f"prefill of {count}", [count, 1], [count + 5, 3], (2, 1), 64, 16) for count in (31, 32, 33, 64, 65)),
    *(_case(f"prefill of {count}, one head", [count], [count], (2, 2), 64, 16) for count in (2, 63, 64, 65)),
    *(_case(f"prefill up to {length}", [3], [length], (1, 1), 32, 16) for length in (31, 32, 33, 63, 64, 65, 96, 97)),
    *(
        _case(f"prefill, {heads} heads of one KV head", [13, 9], [40, 9], (2 * heads, 2), 32, 16)
        for heads in (3, 4, 5, 8)
    ),
    _case("prefill, a token's heads fill several tiles", [2], [5], (150, 1), 8),
    *(
        _case(f"prefill, heads of {dim}", [33], [40], (2, 1), dim, 16)
        for dim in (4, 20, 36, 80, 96, 100, 128, 192, 256)
    ),
    _case("prefill, window over tiles", [70], [100], (2, 2), 32, 16, 40),
    *(_case(f"prefill, window of {window}", [68], [100], (1, 1), 32, 16, window) for window in (2, 31, 32, 33, 64, 99)),
    _case("prefill, pages longer than tiles", [40, 3], [75, 50], (2, 1), 32, 50),
    _case("mixed, decode over parts", [1, 70, 1, 1, 5], [300, 70, 129, 1, 90], (4, 1), 64, 16),
    _case("mixed, many short prompts", [2, 1, 3, 2, 1, 1, 2, 4, 1], [2, 4, 30, 3, 8, 1, 40, 4, 33], (2, 1), 16),
    _case("decode, heads as in an 8B model", [1, 1], [300, 17], (32, 8), 128, 16),
    _case("prefill, heads as in an 8B model", [35], [50], (32, 8), 128, 16),
    _case("mixed, window and soft cap", [40, 1, 1], [50, 200, 7], (4, 2), 80, 16, 30, 3.0),
    Case("by hand", _by_hand, expected=([[[14.0]]],)),
]


def _runs(pages: list[int], page_size: int, first: int, stop: int, most: int) -> Iterator[slice]:
    """Slots of positions first to stop - 1: neighbouring pages are joined, up to a length, so that a run is a view."""
    position = first
    while position < stop:
        index, offset = divmod(position, page_size)
        slot = pages[index] * page_size + offset
        length = page_size - offset
        while length < most and position + length < stop and pages[index + 1] == pages[index] + 1:
            index += 1
            length += page_size
        length = min(length, stop - position, most)
        yield slice(slot, slot + length)
        position += length


def _weights(q: Array, keys: list[Array], count: int, first: int, end: int, window: int, softcap: float) -> Array:
    """exp(score - max) of scaled queries q (G, H/G * count, D) with the keys of positions first to end - 1, masked."""
    parts = [q @ k.transpose(1, 2, 0) for k in keys]
    scores = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)  # (G, H/G * count, S)
    if softcap:
        scores /= softcap
        np.tanh(scores, out=scores)
        scores *= softcap
    if count > 1:
        # Row i stands at position end - count + i: only the last `count` keys can lie after a row.
        start = first if window else end - count
        distance = np.arange(end - count, end)[:, None] - np.arange(start, end)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        by_query = scores.reshape(len(q), -1, count, end - first)
        np.copyto(by_query[..., start - first :], -np.inf, where=hidden)
    scores -= np.maximum.reduce(scores, axis=2, keepdims=True)
    return np.exp(scores, out=scores)


def _weighted(weights: Array, values: list[Array]) -> Array:
    """The values (S, G, D), in runs, weighted and summed: (G, rows, D)."""
    if len(values) == 1:
        return weights @ values[0].transpose(1, 0, 2)
    ends = np.cumsum([len(v) for v in values])
    parts = [weights[:, :, end - len(v) : end] @ v.transpose(1, 0, 2) for end, v in zip(ends, values, strict=True)]
    return np.add.reduce(parts)


def _paged_attention_cpu(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    starts: Array,
    lengths: Array,
    page_table: Array,
    scale: float,
    window: int,
    softcap: float,
) -> Array:
    _, page_size, kv_heads, dim = k_pages.shape
    k_slots, v_slots = k_pages.reshape(-1, kv_heads, dim), v_pages.reshape(-1, kv_heads, dim)
    tokens, heads, _ = q.shape
    group = heads // kv_heads
    scaled = (q * q.dtype.type(scale)).reshape(tokens, kv_heads, group, dim)
    out = np.empty_like(scaled)
    bounds = starts.tolist()
    for row, (length, pages) in enumerate(zip(lengths.tolist(), page_table.tolist(), strict=True)):
        block = min(max(_SCORE_BYTES // (heads * length * q.itemsize), 1), _QUERY_BLOCK)
        for begin in range(bounds[row], bounds[row + 1], block):
            stop = min(begin + block, bounds[row + 1])
            count = stop - begin
            end = length - (bounds[row + 1] - stop)
            first = max(end - count + 1 - window, 0) if window else 0
            # (G, H/G * count, D)
            packed = (
                scaled[begin]
                if count == 1
                else scaled[begin:stop].transpose(1, 2, 0, 3).reshape(kv_heads, group * count, dim)
            )
            runs = list(_runs(pages, page_size, first, end, max(_SMALL_SCORES // group, 1) if count == 1 else length))
            weights = _weights(packed, [k_slots[run] for run in runs], count, first, end, window, softcap)
            values = _weighted(weights, [v_slots[run] for run in runs])
            values /= np.add.reduce(weights, axis=2, keepdims=True)
            out[begin:stop] = values.reshape(kv_heads, group, count, dim).transpose(2, 0, 1, 3)
    return out.reshape(q.shape)


_MAX_HEAD_DIM = 256
"""In the decode kernel a wave holds a head, 8 numbers a lane."""
_PACKED = 4
"""Most query heads that a decode block takes together."""
_MAX_PARTS = 128
"""MAX_PARTS of the kernel: one block joins them."""
_TILE = 32
"""Queries of a prefill block."""
_STYLES = {None: 0, "neox": 1, "interleaved": 2}
"""ROPE of the decode kernel."""


def decode(
    device: GPU,
    heads: int,
    q: Any,
    rope: Arrays,
    lengths: Any,
    slots: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    eps: float,
    scale: float,
    window: int,
    softcap: float,
    *,
    style: str | None = None,
) -> Any:
    """Attention of one query per sequence, (B, H, D), in one launch: of the queries q, or, with a style of RoPE, of
    those that the kernel makes from rope = (qkv, bias, q_norm, k_norm, rotations, query_scale). qkv may be `Slices`."""
    rows, pages = page_table.shape
    _, page_size, kv_heads, dim = k_pages.shape
    _check_head_dim(dim)
    group = heads // kv_heads
    packed = -(-group // -(-group // _PACKED))  # 6 heads are 3 and 3
    groups = kv_heads * -(-group // packed)
    choice = device.choice("attention_decode", dim=dim, packed=packed, kv_heads=kv_heads, rows=rows)
    least_span, core_blocks = choice["MIN_SPAN"], choice["MIN_BLOCKS"]
    # Parts for the longest context there can be, as many as fill the device: how many a row has depends on its length,
    # which is not known here. Blocks without a part cost little.
    positions = min(pages * page_size, window or pages * page_size)
    splits = min(_filling(rows * groups, core_blocks * device.num_cus), -(-positions // least_span), _MAX_PARTS)
    out = device.empty((rows, heads, dim), device.dtype)
    slices = 1
    if style and isinstance(rope[0], Slices):
        slices, rope = len(rope[0].parts), (rope[0].parts, *rope[1:])
    values = sums = arrived = None
    if splits > 1:
        parts = rows * groups * splits * packed
        memory = device.scratch((parts * (dim + 2),), np.float32)
        values, sums = memory[: parts * dim], memory[parts * dim :]
        arrived = device.counters(rows * groups)
    device.run(
        "attention_decode",
        "attention_decode",
        (rows, groups, splits),
        *(q, *rope, lengths, slots, k_pages, v_pages, page_table, out, values, sums, arrived),
        *(heads, kv_heads, pages, rope[4].shape[1] if style else 0, rows, slices, splits, eps, scale, window, softcap),
        HEAD_DIM=dim,
        PAGE=page_size,
        PACKED=packed,
        ROPE=_STYLES[style],
        THREADS=choice["THREADS"],
        POSITIONS=choice["POSITIONS"],
        MIN_BLOCKS=core_blocks,
    )
    return out


def _filling(blocks: int, places: int) -> int:
    """Into how many each block is to be split, so that the places of a device are full once, or a few times over."""
    times = max(range(1, 5), key=lambda n: min(n * places // blocks * blocks / (n * places), 0.9))
    return max(times * places // blocks, 1)


def _check_head_dim(dim: int) -> None:
    if dim > _MAX_HEAD_DIM:
        raise UnsupportedError(f"heads of {dim} numbers have no kernel: {_MAX_HEAD_DIM} is the most")


def _paged_attention_gpu(
    device: GPU,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    starts: Any,
    lengths: Any,
    page_table: Any,
    scale: float,
    window: int,
    softcap: float,
) -> Any:
    tokens, heads, dim = q.shape
    rows, pages = page_table.shape
    _, page_size, kv_heads, _ = k_pages.shape
    if tokens == rows:
        cache = k_pages, v_pages, page_table
        return decode(device, heads, q, (None,) * 6, lengths, None, *cache, 0.0, scale, window, softcap)
    _check_head_dim(dim)
    out = device.empty(q.shape, device.dtype)
    device.run(
        "attention_prefill",
        "attention_prefill",
        (tokens // _TILE + rows, heads),
        *(q, k_pages, v_pages, starts, lengths, page_table, out),
        *(rows, heads, kv_heads, pages, scale, window, softcap),
        HEAD_DIM=dim,
        PAGE=page_size,
    )
    return out


def _attention_scores_cpu(q: Array, k: Array, scale: float, softcap: float) -> Array:
    (queries, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    packed = (q * q.dtype.type(scale)).transpose(1, 0, 2).reshape(kv_heads, -1, dim)  # (G, H/G * T, D)
    scores = (packed @ k.transpose(1, 2, 0)).reshape(heads, queries, keys)
    if softcap:
        scores /= softcap
        np.tanh(scores, out=scores)
        scores *= softcap
    return scores


def _attention_scores_gpu(device: GPU, q: Any, k: Any, scale: float, softcap: float) -> Any:
    (queries, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    scores = device.empty((heads, queries, keys), np.float32)
    sizes = (heads, kv_heads, queries, keys, dim, scale, softcap)
    device.run("attention_steps", "attention_scores", (-(-keys // 256), queries, heads), q, k, scores, *sizes)
    return scores


def _causal_mask_gpu(device: GPU, scores: Any, window: int) -> Any:
    heads, queries, keys = scores.shape
    grid = -(-keys // 256), queries, heads
    device.run("attention_steps", "causal_mask", grid, scores, queries, keys, window)
    return scores


def _softmax_gpu(device: GPU, scores: Any) -> Any:
    heads, queries, keys = scores.shape
    weights = device.empty(scores.shape, np.float32)
    device.run("attention_steps", "softmax", heads * queries, scores, weights, keys)
    return weights


def _attention_values_gpu(device: GPU, weights: Any, v: Any) -> Any:
    (heads, queries, keys), (_, kv_heads, dim) = weights.shape, v.shape
    out = device.empty((queries, heads, dim), device.dtype)
    sizes = (heads, kv_heads, queries, keys, dim)
    device.run("attention_steps", "attention_values", (-(-dim // 256), queries, heads), weights, v, out, *sizes)
    return out


@op(
    "q:act[T,H,D] k_pages:act[N,P,G,D] v_pages:act[N,P,G,D] starts:i32[B+1] lengths:i32[B] page_table:i32[B,M] "
    "scale:f32 window:i32 softcap:f32 -> out:act[T,H,D]",
    cpu=_paged_attention_cpu,
    gpu=_paged_attention_gpu,
    cases=_CASES,
    rtol=1e-4,
    atol=1e-5,
)
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    starts: Array,
    lengths: Array,
    page_table: Array,
    scale: float,
    window: int,
    softcap: float,
) -> Array:
    """softmax(mask(softcap(q @ k.T * scale))) @ v over each sequence's pages.

    Causal; with a window W a query sees the W latest positions, its own included (0 = all). Query head h reads KV head
    h // (H/G). Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA), arXiv:2309.06180 (pages).
    """
    out = np.empty_like(q)
    for row, length in enumerate(lengths):
        needed = -(-int(length) // k_pages.shape[1])
        k = k_pages[page_table[row, :needed]].reshape(-1, *k_pages.shape[2:])[:length]  # (S, G, D)
        v = v_pages[page_table[row, :needed]].reshape(-1, *v_pages.shape[2:])[:length]
        part = slice(starts[row], starts[row + 1])
        scores = attention_scores.reference(q[part], k, scale, softcap)
        weights = softmax.reference(causal_mask.reference(scores, window))
        out[part] = attention_values.reference(weights, v)
    return out


def _qk(rng: np.random.Generator, keys: int = 9) -> tuple[Array, Array]:
    return rng.standard_normal((5, 6, 32)).astype(np.float32), rng.standard_normal((keys, 2, 32)).astype(np.float32)


@op(
    "q:act[T,H,D] k:act[S,G,D] scale:f32 softcap:f32 -> scores:f32[H,T,S]",
    cpu=_attention_scores_cpu,
    gpu=_attention_scores_gpu,
    cases=[
        Case("grouped", lambda rng: (*_qk(rng), 0.25, 0.0)),
        Case("soft cap", lambda rng: (*_qk(rng), 0.25, 1.5)),
        Case("more keys than a block", lambda rng: (*_qk(rng, 300), 0.25, 0.0)),
        Case(
            "by hand",
            lambda rng: (np.array([[[1, 2]]], np.float32), np.array([[[3, 4]], [[5, 6]]], np.float32), 0.5, 0.0),
            expected=([[[5.5, 8.5]]],),
        ),
    ],
)
def attention_scores(q: Array, k: Array, scale: float, softcap: float) -> Array:
    """q @ k.T * scale for every head, bounded by softcap * tanh(score / softcap) if there is one."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)  # (S, H, D)
    scores = np.einsum("thd,shd->hts", q, k) * q.dtype.type(scale)
    return softcap * np.tanh(scores / softcap) if softcap else scores


@op(
    "&scores:f32[H,T,S] window:i32 -> masked:f32[H,T,S]",
    gpu=_causal_mask_gpu,
    cases=[
        Case(
            "causal",
            lambda rng: (np.zeros((1, 2, 3), np.float32), 0),
            expected=([[[0, 0, -np.inf], [0, 0, 0]]],),
        ),
        Case(
            "window",
            lambda rng: (np.zeros((1, 2, 4), np.float32), 2),
            expected=([[[-np.inf, 0, 0, -np.inf], [-np.inf, -np.inf, 0, 0]]],),
        ),
        Case("more keys than a block", lambda rng: (rng.random((2, 40, 300), np.float32), 270)),
    ],
)
def causal_mask(scores: Array, window: int) -> Array:
    """-inf where a key lies after its query, or W or more positions before it; the queries are the last T positions."""
    _, queries, keys = scores.shape
    distance = (np.arange(queries) + keys - queries)[:, None] - np.arange(keys)
    scores[:, (distance < 0) | ((distance >= window) if window else False)] = -np.inf
    return scores


@op(
    "scores:f32[H,T,S] -> weights:f32[H,T,S]",
    gpu=_softmax_gpu,
    cases=[
        Case("random", lambda rng: (rng.standard_normal((3, 5, 65)).astype(np.float32) * 10,)),
        Case("more keys than a block", lambda rng: (rng.standard_normal((2, 3, 600)).astype(np.float32) * 3,)),
        Case("far above all others, in each lane", lambda rng: (200 * np.eye(64, dtype=np.float32)[None],)),
        Case("one", lambda rng: (np.full((1, 1, 1), -1e30, np.float32),), expected=([[[1]]],)),
        Case("masked", lambda rng: (np.array([[[-np.inf, 5, 5]]], np.float32),), expected=([[[0, 0.5, 0.5]]],)),
    ],
)
def softmax(scores: Array) -> Array:
    """exp(x - max) / sum over the last axis: the attention weights."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


@op(
    "weights:f32[H,T,S] v:act[S,G,D] -> out:act[T,H,D]",
    gpu=_attention_values_gpu,
    cases=[
        Case(
            "grouped",
            lambda rng: (rng.random((6, 5, 9)).astype(np.float32), rng.standard_normal((9, 2, 32)).astype(np.float32)),
        ),
        Case(
            "heads of more than a block",
            lambda rng: (rng.random((2, 3, 9)).astype(np.float32), rng.standard_normal((9, 1, 300)).astype(np.float32)),
        ),
        Case(
            "by hand",
            lambda rng: (np.array([[[0.25, 0.75]]], np.float32), np.array([[[8]], [[16]]], np.float32)),
            expected=([[[14]]],),
        ),
    ],
)
def attention_values(weights: Array, v: Array) -> Array:
    """The values weighted and summed."""
    return np.einsum("hts,shd->thd", weights, np.repeat(v, weights.shape[0] // v.shape[1], axis=1))
