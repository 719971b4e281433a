"""Paged attention of a ragged batch, and the attention weights of one prompt.

The KV cache is pages of P positions; a sequence's page table lists its pages in order. In a ragged batch the queries of
sequence b are rows starts[b] to starts[b + 1], the last of its lengths[b] positions. Prefill, decode and mixtures of
the two are the same call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.errors import UnsupportedError
from forge.ops import attention_wgmma
from forge.ops.activation import soft_cap
from forge.ops.kv_cache import KVPages
from forge.ops.op import Array, op, record
from forge.tuning.lds import prefill_lds_bytes, prefill_slices

MAX_HEAD_DIM = 256
"""In the kernels of one query a wave holds a head, 8 numbers a lane."""
MAX_PREFILL_HEAD_DIM = 512
"""Keys and values of a tile must fit into LDS, and a wave's share of the results into registers."""
_MAX_PACKED = 4
"""Query heads of one KV head that a block takes together, at most, where a query has blocks of its own."""
_SPLIT_TOKENS = 256
"""Queries of a launch whose positions are split: their states take memory."""
_MAX_SPLITS = 16
"""Splits of a query's positions, at most, where their number may not depend on how many queries there are."""
_QUERY_BLOCK = 128
"""On NumPy, the most queries whose scores are computed together."""
_SCORE_BYTES = 64 << 20
"""On NumPy, the most bytes of scores at a time: with many heads or a long context, fewer queries go together."""
_SMALL_SCORES = 1200
"""Scores per KV head up to which OpenBLAS multiplies q by k without packing them: four times as fast for one query."""


@record("scale:f32 window:i32 softcap:f32 is_deterministic:bool sinks?:f32[H] is_chunked:bool")
@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How a layer makes weights of scores."""

    scale: float
    """Factor of q @ k.T."""
    window: int
    """Latest positions that a query sees, its own included; 0 = all."""
    softcap: float
    """Scores become softcap * tanh(score / softcap); 0 = they stay."""
    is_deterministic: bool = False
    """A query's result has the same bits whatever queries, sequences and pages there are beside it."""
    sinks: Any | None = None
    """Each head has one more score, without a value: it takes a share of the weights (arXiv:2309.17453). None = no."""
    is_chunked: bool = False
    """The window is a chunk: a query sees the positions of its own chunk of so many, up to its own."""

    def first_seen(self, position: Any) -> Any:
        """The first position that queries at some positions see."""
        if self.is_chunked:
            return position // self.window * self.window
        return np.maximum(position + 1 - self.window, 0) if self.window else 0 * position

    def defines(self) -> dict[str, int]:
        """What kernels are compiled with for chunks and for sinks: without them they have no code for these."""
        return ({"CHUNKED": 1} if self.is_chunked else {}) | ({} if self.sinks is None else {"SINKS": 1})


@op(
    "q:act[T,H,D] kv:KVPages starts:i32[B+1] lengths:i32[B] page_table:i32[B,M] spec:AttentionSpec -> out:act[T,H,D]",
    rtol=1e-4,
    atol=1e-5,
)
def paged_attention(
    q: Array, kv: KVPages, starts: Array, lengths: Array, page_table: Array, spec: AttentionSpec
) -> Array:
    """softmax(mask(softcap(q @ k.T * scale))) @ v over each sequence's pages, causal.

    Query head h reads KV head h // (H/G). Sources: arXiv:1706.03762, arXiv:2305.13245 (GQA), arXiv:2309.06180 (pages).
    """
    out = np.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        part = slice(starts[row], starts[row + 1])
        first = int(spec.first_seen(length - len(q[part])))  # released pages are not read
        pages = page_table[row, : -(-length // kv.k.shape[1])]
        k, v = (array[pages].reshape(-1, *array.shape[2:])[first:length] for array in (kv.k, kv.v))  # (S, G, D)
        weights = attention_weights(q[part], k, spec, first)  # (H, T, S)
        out[part] = np.einsum("hts,shd->thd", weights, np.repeat(v, q.shape[1] // v.shape[1], axis=1))
    return out


def attention_weights(q: Array, k: Array, spec: AttentionSpec, first: int = 0) -> Array:
    """softmax(mask(softcap(q @ k.T * scale))) on NumPy: q (T, H, D), k (S, G, D) -> (H, T, S).

    The queries are the last T of S positions, from `first` on. A query sees no later key, and with a window W the W
    latest, or those of its chunk. With sinks the weights of a query add up to less than 1.
    """
    (queries, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    scaled = (q * q.dtype.type(spec.scale)).transpose(1, 0, 2).reshape(kv_heads, -1, dim)  # (G, H/G * T, D)
    scores = (scaled @ k.transpose(1, 2, 0)).reshape(heads, queries, keys)
    if spec.softcap:
        soft_cap.reference(scores, spec.softcap)
    query, key = first + np.arange(keys - queries, keys)[:, None], first + np.arange(keys)
    scores[:, (key > query) | (key < spec.first_seen(query))] = -np.inf
    greatest = scores.max(axis=-1, keepdims=True)
    if spec.sinks is not None:
        sinks = spec.sinks[:, None, None].astype(scores.dtype)  # (H, 1, 1)
        greatest = np.maximum(greatest, sinks)
    weights = np.exp(scores - greatest)
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / (total if spec.sinks is None else total + np.exp(sinks - greatest)))


@paged_attention.cpu
def _paged_attention_cpu(
    q: Array, kv: KVPages, starts: Array, lengths: Array, page_table: Array, spec: AttentionSpec
) -> Array:
    _, page_size, kv_heads, dim = kv.k.shape
    k_slots, v_slots = kv.k.reshape(-1, kv_heads, dim), kv.v.reshape(-1, kv_heads, dim)
    tokens, heads, _ = q.shape
    group = heads // kv_heads
    scaled = (q * q.dtype.type(spec.scale)).reshape(tokens, kv_heads, group, dim)
    out = np.empty_like(scaled)
    bounds = starts.tolist()
    for row, (length, pages) in enumerate(zip(lengths.tolist(), page_table.tolist(), strict=True)):
        block = min(max(_SCORE_BYTES // (heads * length * q.itemsize), 1), _QUERY_BLOCK)
        if spec.is_deterministic:  # the shapes of all sums depend on the query's position alone
            block = 1
            oldest = int(spec.first_seen(length - (bounds[row + 1] - bounds[row])))
            k_slots, v_slots = (_in_order(array, pages, oldest, length) for array in (kv.k, kv.v))
            pages, page_size = [0], length
        for begin in range(bounds[row], bounds[row + 1], block):
            stop = min(begin + block, bounds[row + 1])
            count = stop - begin
            end = length - (bounds[row + 1] - stop)
            first = int(spec.first_seen(end - count))
            # (G, H/G * count, D)
            packed = (
                scaled[begin]
                if count == 1
                else scaled[begin:stop].transpose(1, 2, 0, 3).reshape(kv_heads, group * count, dim)
            )
            runs = list(_runs(pages, page_size, first, end, max(_SMALL_SCORES // group, 1) if count == 1 else length))
            weights, sums = _weights(packed, [k_slots[run] for run in runs], count, first, end, spec)
            values = _weighted(weights, [v_slots[run] for run in runs])
            values /= sums
            out[begin:stop] = values.reshape(kv_heads, group, count, dim).transpose(2, 0, 1, 3)
    return out.reshape(q.shape)


def _in_order(pages: Array, numbers: list[int], first: int, stop: int) -> Array:
    """What the pages hold of positions first to stop - 1, one behind the other: (stop, G, D). Before them is anything.

    It is a view where the pages lie so.
    """
    _, page_size, *dims = pages.shape
    first_page = max(first, 0) // page_size
    numbers = numbers[first_page : -(-stop // page_size)]
    start = numbers[0] - first_page
    if start >= 0 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return pages[start:].reshape(-1, *dims)
    found = np.empty((first_page + len(numbers), page_size, *dims), pages.dtype)
    found[first_page:] = pages[numbers]
    return found.reshape(-1, *dims)


def _runs(pages: list[int], page_size: int, first: int, stop: int, max_length: int) -> Iterator[slice]:
    """Slots of positions first to stop - 1, as slices. Neighbouring pages are joined, up to a length."""
    position = first
    while position < stop:
        index, offset = divmod(position, page_size)
        slot = pages[index] * page_size + offset
        length = page_size - offset
        while length < max_length and position + length < stop and pages[index + 1] == pages[index] + 1:
            index += 1
            length += page_size
        length = min(length, stop - position, max_length)
        yield slice(slot, slot + length)
        position += length


def _weights(q: Array, keys: list[Array], count: int, first: int, end: int, spec: AttentionSpec) -> tuple[Array, Array]:
    """exp(score - max) of scaled queries q (G, H/G * count, D) with the keys of positions first to end - 1, masked; and
    its sums (G, H/G * count, 1), to which a sink belongs."""
    parts = [q @ k.transpose(1, 2, 0) for k in keys]
    scores = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)  # (G, H/G * count, S)
    if spec.softcap:
        soft_cap.reference(scores, spec.softcap)
    if count > 1:
        # Row i stands at position end - count + i: only the last `count` keys can lie after a row.
        start = first if spec.window else end - count
        query, key = np.arange(end - count, end)[:, None], np.arange(start, end)
        hidden = key > query
        if spec.window:
            hidden |= key < spec.first_seen(query)
        by_query = scores.reshape(len(q), -1, count, end - first)
        np.copyto(by_query[..., start - first :], -np.inf, where=hidden)
    greatest = np.maximum.reduce(scores, axis=2, keepdims=True)
    if spec.sinks is None:
        scores -= greatest
        np.exp(scores, out=scores)
        return scores, np.add.reduce(scores, axis=2, keepdims=True)
    sinks = np.repeat(spec.sinks.astype(scores.dtype), count).reshape(greatest.shape)
    np.maximum(greatest, sinks, out=greatest)
    scores -= greatest
    np.exp(scores, out=scores)
    sums = np.add.reduce(scores, axis=2, keepdims=True)
    sums += np.exp(sinks - greatest)
    return scores, sums


def _weighted(weights: Array, values: list[Array]) -> Array:
    """The values (S, G, D), in runs, weighted and summed: (G, rows, D)."""
    if len(values) == 1:
        return weights @ values[0].transpose(1, 0, 2)
    ends = np.cumsum([len(v) for v in values])
    parts = [weights[:, :, end - len(v) : end] @ v.transpose(1, 0, 2) for end, v in zip(ends, values, strict=True)]
    return np.add.reduce(parts)


@paged_attention.gpu
def _paged_attention_gpu(
    device: GPU, q: Any, kv: KVPages, starts: Any, lengths: Any, page_table: Any, spec: AttentionSpec
) -> Any:
    tokens, heads, dim = q.shape
    rows, pages = page_table.shape
    _, page_size, kv_heads, _ = kv.k.shape
    out = device.empty(q.shape, device.dtype)
    if spec.is_deterministic:
        check_head_dim(dim)
        for first in range(0, tokens, _SPLIT_TOKENS):
            some = slice(first, first + _SPLIT_TOKENS)
            _split_kv(device, q[some], kv, starts, lengths, page_table, spec, out[some], first)
        return out
    if attention_wgmma.supports(device, dim):
        numbers = spec.scale, spec.window, spec.softcap, spec.sinks
        attention_wgmma.run(device, q, kv, starts, lengths, page_table, numbers, spec.defines(), out)
        return out
    check_head_dim(dim, MAX_PREFILL_HEAD_DIM)
    group, slices = heads // kv_heads, prefill_slices(dim)
    choice = device.choice("attention_prefill", dim=dim, packed=group, kv_heads=kv_heads)
    block_queries = choice["WAVES"] // slices * choice["QUERIES"]
    device.run(
        "attention_prefill",
        "attention_prefill",
        (kv_heads, tokens * group // block_queries + rows),
        *(q, kv.k, kv.v, starts, lengths, page_table, out),
        *(rows, heads, kv_heads, pages, spec.scale, spec.window, spec.softcap, spec.sinks),
        HEAD_DIM=dim,
        PAGE=page_size,
        THREADS=choice["WAVES"] * device.wave_size,
        QUERIES=choice["QUERIES"],
        KEYS=choice["KEYS"],
        SLICES=slices,
        MIN_BLOCKS=choice["MIN_BLOCKS"],
        LDS_BYTES=prefill_lds_bytes(dim, choice),
        **spec.defines(),
    )
    return out


def _split_kv(
    device: GPU,
    q: Any,
    kv: KVPages,
    starts: Any,
    lengths: Any,
    page_table: Any,
    spec: AttentionSpec,
    out: Any,
    first_token: int,
) -> None:
    """Each query by blocks of its own. How its positions are split depends on the device and the heads alone."""
    tokens, heads, dim = q.shape
    rows, pages = page_table.shape
    _, page_size, kv_heads, _ = kv.k.shape
    group = heads // kv_heads
    packed = packed_heads(group)
    groups = kv_heads * -(-group // packed)
    choice = device.choice("attention_decode", dim=dim, packed=packed, kv_heads=kv_heads, rows=1)
    fill = choice["MIN_BLOCKS"] * device.num_cus // groups
    turns = -(-pages * page_size // (choice["THREADS"] // device.wave_size * 16 * choice["POSITIONS"]))
    splits = max(min(fill, turns, _MAX_SPLITS), 1)  # splits beyond the turns that there can be would have none
    device.run(
        "attention_split_kv",
        "attention_split_kv",
        (tokens, groups, splits),
        *(q, kv.k, kv.v, starts, lengths, page_table, out),
        *split_states(device, tokens * groups, splits, packed, dim),
        *(rows, first_token, heads, kv_heads, pages, splits, spec.scale, spec.window, spec.softcap, spec.sinks),
        HEAD_DIM=dim,
        PAGE=page_size,
        PACKED=packed,
        THREADS=choice["THREADS"],
        POSITIONS=choice["POSITIONS"],
        MIN_BLOCKS=choice["MIN_BLOCKS"],
        **spec.defines(),
    )


def split_states(device: GPU, blocks: int, splits: int, packed: int, dim: int) -> tuple[Any, Any, Any]:
    """Where the splits of so many blocks leave their states: values, maxima with sums, and counters of the splits that
    have ended; None each for one split."""
    if splits == 1:
        return None, None, None
    partials = blocks * splits * packed
    memory = device.scratch((partials * (dim + 2),), np.float32)
    return memory[: partials * dim], memory[partials * dim :], device.counters(blocks)


def packed_heads(group: int) -> int:
    """Query heads of one KV head that a block takes together, where it has `group` of them: 6 heads are 3 and 3."""
    return -(-group // -(-group // _MAX_PACKED))


def check_head_dim(dim: int, most: int = MAX_HEAD_DIM) -> None:
    """Raises UnsupportedError for heads that a kernel cannot hold."""
    if dim > most:
        raise UnsupportedError(f"heads of {dim} numbers have no kernel: {most} is the most")
