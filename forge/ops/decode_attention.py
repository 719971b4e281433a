"""A decode step's attention as one op: from the product of each sequence's new token to the attended values."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.attention import decode, paged_attention
from forge.ops.op import Array, Arrays, Case, op
from forge.ops.rope import random_product, rope_append_kv


def _case(
    name: str,
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    style: str = "neox",
    *,
    rotated: int | None = None,
    extras: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    page_size: int = 16,
    more_pages: int = 0,
) -> Case:
    """`more_pages`: columns of the page table beyond those of the longest sequence."""
    num_kv_heads = heads[1]

    def make(rng: np.random.Generator) -> Arrays:
        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        rows = len(lengths)
        needed = [-(-length // page_size) for length in lengths]
        pages = sum(needed) + 2
        shuffled = rng.permutation(pages).astype(np.int32)
        table = np.full((rows, max(needed) + more_pages), -1, np.int32)
        k, v = np.full((2, pages, page_size, num_kv_heads, dim), np.nan, np.float32)  # unused slots poison a result
        slots = np.empty(rows, np.int32)
        start = 0
        for row, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            table[row, :count] = shuffled[start : start + count]
            start += count
            for position in range(length - 1):
                page, offset = table[row, position // page_size], position % page_size
                k[page, offset], v[page, offset] = normal(num_kv_heads, dim), normal(num_kv_heads, dim)
            page, offset = divmod(length - 1, page_size)
            slots[row] = table[row, page] * page_size + offset
        turned = dim if rotated is None else rotated
        return (
            *random_product(rng, rows, heads, dim, max(lengths), turned, extras=extras),
            np.array(lengths, np.int32),
            slots,
            *(k, v, table),
            *(1e-6, dim**-0.5, window, softcap),
        )

    return Case(name, make, {"style": style})


def _by_hand(style: str, value: float) -> Case:
    """At position 1, a quarter turn makes (ln 3, 0) of the query and (1, 0) of the key, in either style; the key before
    is zero. Scores 0 and ln 3: weights 1/4 and 3/4 over values 8 and 16."""

    def make(rng: np.random.Generator) -> Arrays:
        qkv = np.array([[0, -np.log(3), 0, -1, 16, value]], np.float32)
        rotations = np.array([[[1, 0]], [[0, 1]]], np.float32)
        k, v = np.zeros((1, 2, 1, 2), np.float32), np.array([[[[8, 0]], [[0, 0]]]], np.float32)
        at = np.array([2], np.int32), np.array([1], np.int32)
        return qkv, None, None, None, rotations, None, *at, k, v, np.array([[0]], np.int32), 0.0, 1.0, 0, 0.0

    written = [[[[0, 0]], [[1, 0]]]], [[[[8, 0]], [[16, value]]]]
    return Case(f"{style} by hand", make, {"style": style}, ([[[14, 0.75 * value]]],), written)


_CASES = [
    _case("one position", [1], (2, 1), 8),
    _case("interleaved, one position", [1], (1, 1), 64, "interleaved"),
    _case("page edges", [16, 17, 32, 33], (6, 2), 64),
    # Parts of the context (64 positions at least), and positions that a block takes in a turn.
    *(_case(f"{length} positions", [length], (2, 1), 64) for length in (2, 63, 64, 65, 66, 127, 128, 129, 130)),
    _case("interleaved, 129 positions", [129], (4, 2), 64, "interleaved"),
    _case("long contexts and short ones", [1, 130, 1023], (4, 2), 64, extras=True),
    _case("interleaved, long contexts and short ones", [700, 3], (4, 2), 64, "interleaved", extras=True),
    _case("more positions than parts take at least", [1500], (8, 8), 32),
    _case("a page table for a longer context", [200, 5], (4, 1), 64, more_pages=90),
    _case("one row of one head, in as many parts as there can be", [1300], (1, 1), 32, more_pages=20),
    _case("window over parts", [400, 90], (8, 1), 128, window=200),
    _case("window shorter than a part", [700, 20], (4, 1), 64, window=50),
    _case("window of one", [9, 1], (2, 2), 16, window=1, extras=True),
    _case("window as long as the context", [16], (4, 2), 16, window=16),
    _case("soft cap over parts", [300], (2, 1), 64, softcap=2.0),
    _case("soft cap, interleaved, bias and norms", [300, 1], (4, 1), 256, "interleaved", softcap=1.5, extras=True),
    *(_case(f"{heads} heads of one KV head", [70, 9], (heads, 1), 32) for heads in (3, 5, 6, 7, 9, 17)),
    _case("heads as in an 8B model", [300, 17], (32, 8), 128),
    _case("heads as in a 0.5B model", [130], (14, 2), 64, extras=True),
    _case("chunks of heads of several KV heads, in parts", [200, 65], (10, 2), 64, extras=True),
    *(_case(f"heads of {dim}", [20, 137], (6, 2), dim) for dim in (4, 20, 36, 70, 80, 96, 100, 128, 192, 256)),
    *(
        _case(f"{style}, {rotated} of {dim} numbers turn, bias and norms", [20, 37], (6, 2), dim, style,
              rotated=rotated, extras=True)
        for style in ("neox", "interleaved")
        for dim, rotated in ((80, 32), (96, 96), (36, 20), (64, 2))
    ),
    _case("pages longer than parts", [140, 3], (2, 1), 32, page_size=100),
    _by_hand("neox", 4.0),
    _by_hand("interleaved", 4.0),
]  # fmt: skip


def _parts(
    qkv: Array,
    bias: Array | None,
    q_norm: Array | None,
    k_norm: Array | None,
    rotations: Array,
    query_scale: Array | None,
    lengths: Array,
    slots: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    eps: float,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Arrays, Arrays]:
    """The arguments of rope_append_kv; those of paged_attention behind its queries."""
    rope = qkv, bias, q_norm, k_norm, rotations, query_scale, lengths - 1, slots, k_pages, v_pages, eps
    starts = np.arange(len(lengths) + 1, dtype=np.int32)
    return rope, (k_pages, v_pages, starts, lengths, page_table, scale, window, softcap)


def _decode_attention_cpu(*args: Any, style: str) -> Array:
    rope, attention = _parts(*args)
    return np.asarray(paged_attention.run_cpu(rope_append_kv.run_cpu(*rope, style=style), *attention))


def _decode_attention_gpu(device: GPU, *args: Any, style: str) -> Any:
    *rope, lengths, slots, k_pages, v_pages, page_table, eps, scale, window, softcap = args
    _, _, kv_heads, dim = k_pages.shape
    heads = rope[0].shape[1] // dim - 2 * kv_heads
    cache = lengths, slots, k_pages, v_pages, page_table
    return decode(device, heads, None, tuple(rope), *cache, eps, scale, window, softcap, style=style)


@op(
    "qkv:f32[B,H*D+2*G*D] bias?:f32[H*D+2*G*D] q_norm?:f32[D] k_norm?:f32[D] rotations:f32[C,R,2] "
    "query_scale?:f32[C] lengths:i32[B] slots:i32[B] &k_pages:act[N,P,G,D] &v_pages:act[N,P,G,D] page_table:i32[B,M] "
    "eps:f32 scale:f32 window:i32 softcap:f32 style=neox|interleaved -> out:act[B,H,D]",
    cpu=_decode_attention_cpu,
    gpu=_decode_attention_gpu,
    cases=_CASES,
    rtol=1e-4,
    atol=1e-5,
)
def decode_attention(*args: Any, style: str) -> Array:
    """rope_append_kv, then paged_attention, where each sequence has one token, the last of its lengths[b] positions.

    Attention sees that token's key and value as the cache holds them.
    """
    rope, attention = _parts(*args)
    return np.asarray(paged_attention.reference(rope_append_kv.reference(*rope, style=style), *attention))
